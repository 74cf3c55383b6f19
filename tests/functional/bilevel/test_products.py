"""Products with second derivatives against dense matrices, and what happens where there are none."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hpo.functional.bilevel.ift import ift_cg
from lightning_hpo.functional.bilevel.problem import Loss, Point, Problem, Tensors
from lightning_hpo.functional.bilevel.products import central_difference, products
from lightning_hpo.functional.bilevel.second_derivatives import (
    SecondDerivativesMissingError,
    second_derivatives_missing,
)


def dense(network: Any) -> tuple[Tensor, Tensor]:
    """The Hessian, and the mixed derivatives with one row for each of the three hyperparameters."""
    point = Point(network.params, network.hparams)
    slope, decay = network.hparams["slope"], network.hparams["decay"]

    def loss(w: Tensor, h: Tensor) -> Tensor:
        return network.problem.train_loss(point.unravel(w), {"slope": h[0], "decay": h[1:]})

    at = point.vector(point.params).detach(), torch.cat([slope[None], decay])
    (hessian, _), (mixed, _) = torch.autograd.functional.hessian(loss, at)
    return hessian, mixed


@pytest.mark.parametrize(("product", "tol"), [("exact", 1e-12), ("fd", 1e-6)])
def test_products_with_the_hessian_and_the_mixed_derivatives(network: Any, product: Any, tol: float) -> None:
    hessian, mixed = dense(network)
    p = torch.linspace(-1, 2, len(hessian)).double()
    second = products(network.problem, Point(network.params, network.hparams), product)
    vector, slopes = second.pull_back(p)
    torch.testing.assert_close(vector, hessian @ p, rtol=tol, atol=tol)
    torch.testing.assert_close(second.push(p), hessian @ p, rtol=tol, atol=tol)
    torch.testing.assert_close(torch.cat([slopes["slope"][None], slopes["decay"]]), mixed @ p, rtol=tol, atol=tol)


def test_gauss_newton_is_the_linearised_network_with_the_curvature_of_the_loss(network: Any) -> None:
    point = Point(network.params, network.hparams)
    flat = point.vector(point.params).detach()
    jacobian = torch.func.jacrev(lambda w: network.problem.outputs(point.unravel(w), network.hparams).flatten())(flat)
    decay = [network.hparams["decay"][k].expand(n) for k, n in enumerate((12, 8))]
    expected = 2 / 24 * jacobian.T @ jacobian + 2 * torch.diag(torch.cat(decay))
    second = products(network.problem, point, "gauss_newton")
    found = torch.stack([second.push(row) for row in torch.eye(20).double()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    exact = products(network.problem, point).pull_back(flat, params=False)[1]
    torch.testing.assert_close(second.pull_back(flat)[1], exact)


def test_a_residual_has_products_both_ways() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 3).double()
    problem = Problem(
        lambda w, h: w["w"].sum(),
        lambda w, h: w["w"].sum(),
        residual=lambda w, h: {"w": (matrix @ w["w"]).sin() * h["a"]},
    )
    w, p = torch.randn(3).double(), torch.randn(3).double()
    second = products(problem, Point({"w": w}, {"a": torch.tensor(2.0).double()}))
    jacobian = 2 * (matrix @ w).cos()[:, None] * matrix
    torch.testing.assert_close(second.push(p), jacobian @ p)
    torch.testing.assert_close(second.push(2 * p), 2 * jacobian @ p)  # one graph, many products
    vector, slopes = second.pull_back(p)
    torch.testing.assert_close(vector, jacobian.T @ p)
    torch.testing.assert_close(slopes["a"], (matrix @ w).sin() @ p)


def test_finite_differences_move_copies_by_the_length_they_promise() -> None:
    seen: list[Tensor] = []

    def loss(params: Tensors, hparams: Tensors) -> Tensor:
        seen.append(params["w"].detach().clone())
        return (hparams["a"] * params["w"] ** 3).sum()

    w = torch.tensor([3.0, 4.0])
    for p in (torch.tensor([1.0, 0.0]), torch.tensor([1e-25, 0.0])):
        seen.clear()
        second = products(Problem(loss, loss), Point({"w": w}, {"a": torch.tensor(1.0)}), "fd")
        found = second.push(p)
        length = math.sqrt(torch.finfo(torch.float32).eps) * 6
        torch.testing.assert_close(seen[0] - w, torch.tensor([length, 0.0]), rtol=1e-3, atol=0.0)
        torch.testing.assert_close(seen[1] - w, torch.tensor([-length, 0.0]), rtol=1e-3, atol=0.0)
        torch.testing.assert_close(found / p.max(), torch.tensor([18.0, 0.0]), rtol=1e-3, atol=1e-3)
    assert torch.equal(second.push(torch.zeros(2)), torch.zeros(2))


def test_a_central_difference_is_exact_for_quadratic_losses() -> None:
    point = Point({"w": torch.tensor([1.0, 2.0]).double()}, {"a": torch.tensor(0.5).double()})
    vector, slopes = central_difference(lambda w, h: h["a"] * (w["w"] ** 2).sum(), point, torch.ones(2).double(), 3.0)
    torch.testing.assert_close(vector, torch.ones(2).double())
    torch.testing.assert_close(slopes["a"], torch.tensor(6.0).double())


def test_a_loss_of_parameters_without_curvature_has_products_of_zero() -> None:
    problem = Problem(lambda w, h: w["w"].sum() + w["v"].square().sum() * h["a"], lambda w, h: w["w"].sum())
    second = products(problem, Point({"w": torch.ones(2), "v": torch.ones(1)}, {"a": torch.tensor(1.0)}))
    torch.testing.assert_close(second.push(torch.ones(3)), torch.tensor([0.0, 0.0, 2.0]))
    flat = Problem(lambda w, h: w["w"].sum(), lambda w, h: w["w"].sum())
    vector, slopes = products(flat, Point({"w": torch.ones(2)}, {"a": torch.tensor(1.0)})).pull_back(torch.ones(2))
    assert torch.equal(vector, torch.zeros(2))
    assert slopes == {"a": None}


def test_bad_kinds_are_refused(ridge: Any) -> None:
    point = Point(ridge.params, ridge.hparams)
    with pytest.raises(ValueError, match="product must be 'exact', 'fd' or 'gauss_newton', got 'kfac'"):
        products(ridge.problem, point, "kfac")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs `outputs` and `output_loss`"):
        products(ridge.problem, point, "gauss_newton")
    residual = Problem(ridge.problem.train_loss, ridge.problem.val_loss, residual=lambda w, h: w)
    with pytest.raises(ValueError, match="`residual` needs product='exact'"):
        products(residual, point, "fd")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


def attention(backend: SDPBackend) -> Loss:
    def loss(params: Tensors, hparams: Tensors) -> Tensor:
        q = params["w"].view(1, 2, 4, 4)
        with sdpa_kernel(backend):
            return (
                F.scaled_dot_product_attention(q, hparams["a"] * q, q).square().sum() + 4 * params["w"].square().sum()
            )

    return loss


def cubes(params: Tensors, hparams: Tensors) -> Tensor:
    return (hparams["a"] * params["w"] ** 2).exp().sum()


def once(params: Tensors, hparams: Tensors) -> Tensor:
    return (Once.apply(params["w"]) * hparams["a"]).exp().sum()


FIRST_ORDER_ONLY = {
    "compiled": (torch.compile(cubes, backend="aot_eager"), cubes),
    "flash": (attention(SDPBackend.FLASH_ATTENTION), attention(SDPBackend.MATH)),
    "once": (once, cubes),
}


@pytest.mark.parametrize("kind", FIRST_ORDER_ONLY)
def test_where_second_derivatives_are_missing_the_error_names_the_remedy_and_it_helps(kind: str) -> None:
    loss, twin = FIRST_ORDER_ONLY[kind]
    inputs = {"w": torch.linspace(-1, 1, 32).double()}, {"a": torch.tensor(0.8).double()}
    val_loss: Loss = lambda w, h: ((w["w"] - 1) ** 2).sum()  # noqa: E731
    with pytest.raises(SecondDerivativesMissingError, match="use product='fd'") as caught:
        ift_cg(Problem(loss, val_loss), *inputs)
    assert second_derivatives_missing(caught.value)
    assert second_derivatives_missing(caught.value.__cause__)
    found = ift_cg(Problem(loss, val_loss), *inputs, product="fd", tol=1e-6).gradients
    expected = ift_cg(Problem(twin, val_loss), *inputs, tol=1e-10).gradients
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "missing"),
    [
        (
            RuntimeError(
                "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported"
            ),
            True,
        ),
        (NotImplementedError("derivative for aten::grid_sampler_2d_backward is not implemented"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("derivative for x is not implemented"), False),
    ],
)
def test_other_errors_stay_themselves(error: Exception, missing: bool) -> None:
    assert second_derivatives_missing(error) is missing

    def loss(params: Tensors, hparams: Tensors) -> Tensor:
        raise error

    with pytest.raises(SecondDerivativesMissingError if missing else type(error)):
        products(Problem(loss, loss), Point({"w": torch.ones(1)}, {"a": torch.ones(1)}))


def test_exact_products_are_one_fixed_map_even_with_dropout() -> None:
    """A linear solver breaks on a map that changes; the graph is built once, so dropout is drawn once."""
    loss: Loss = lambda w, h: (h["a"] * F.dropout(w["w"], 0.5) ** 2).sum()  # noqa: E731
    second = products(Problem(loss, loss), Point({"w": torch.ones(50)}, {"a": torch.tensor(1.0)}))
    first = second.push(torch.ones(50))
    assert 0 < (first == 0).sum() < 50
    assert torch.equal(first, second.push(torch.ones(50)))
