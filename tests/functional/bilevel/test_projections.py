"""Projections and proximal operators: nearest points, derivatives against finite differences, kinks and empty sets."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.affine_projections import (
    projection_affine_set,
    projection_halfspace,
    projection_hyperplane,
)
from lightning_hpo.functional.bilevel.projections import (
    projection_box,
    projection_kl_simplex,
    projection_l1_ball,
    projection_l2_ball,
    projection_l2_sphere,
    projection_linf_ball,
    projection_non_negative,
    projection_simplex,
    projection_sparse_simplex,
)
from lightning_hpo.functional.bilevel.proximal import (
    prox_elastic_net,
    prox_group_lasso,
    prox_lasso,
    prox_non_negative_lasso,
    prox_non_negative_ridge,
    prox_none,
    prox_ridge,
)

DIM = 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def sparse(x: Tensor, hyper: Tensor) -> Tensor:
    return projection_sparse_simplex(x, 3, hyper)


AXIS = random(DIM, seed=1)
PROJECTIONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...] | Tensor | None]] = {
    "non-negative": (projection_non_negative, None),
    "box": (projection_box, (random(DIM, seed=1) - 1, random(DIM, seed=1) + 0.3)),
    "simplex": (projection_simplex, number(1.5)),
    "sparse simplex": (sparse, number(1.5)),
    "l1 ball": (projection_l1_ball, number(2.0)),
    "l1 ball, inside": (projection_l1_ball, number(20.0)),
    "l2 ball": (projection_l2_ball, number(1.5)),
    "l2 ball, inside": (projection_l2_ball, number(20.0)),
    "l2 sphere": (projection_l2_sphere, number(1.5)),
    "linf ball": (projection_linf_ball, number(0.7)),
    "hyperplane": (projection_hyperplane, (AXIS, number(0.5))),
    "half-space": (projection_halfspace, (AXIS, number(-5.0))),
    "half-space, inside": (projection_halfspace, (AXIS, number(9.0))),
    "affine set": (projection_affine_set, (random(2, DIM, seed=2), random(2, seed=3))),
}
PROXES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...] | Tensor | None]] = {
    "none": (prox_none, None),
    "lasso": (prox_lasso, number(0.6)),
    "lasso, weighted": (prox_lasso, random(DIM, seed=4).abs()),
    "non-negative lasso": (prox_non_negative_lasso, number(0.6)),
    "elastic net": (prox_elastic_net, (number(0.6), number(0.8))),
    "group lasso": (prox_group_lasso, number(0.6)),
    "group lasso, inactive": (prox_group_lasso, number(60.0)),
    "ridge": (prox_ridge, number(0.6)),
    "non-negative ridge": (prox_non_negative_ridge, number(0.6)),
}
every_projection = pytest.mark.parametrize("name", PROJECTIONS)
every_operator = pytest.mark.parametrize("name", [*PROJECTIONS, *PROXES, "kl simplex"])


def operator(name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The operator of x and of the tensors of its hyperparameters."""
    if name == "kl simplex":
        return projection_kl_simplex, (number(1.5),)
    function, hyper = (PROJECTIONS | PROXES)[name]
    scaling = {"scaling": 0.7} if name in PROXES else {}
    if hyper is None:
        return lambda x: function(x, None, **scaling), ()
    if isinstance(hyper, tuple):
        return lambda x, *hyper: function(x, hyper, **scaling), hyper
    return lambda x, hyper: function(x, hyper, **scaling), (hyper,)


@every_operator
def test_derivatives_in_both_modes_of_both_orders(name: str) -> None:
    function, hyper = operator(name)
    inputs = tuple(part.clone().requires_grad_() for part in (random(DIM), *hyper))
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@every_operator
def test_vmap_and_batches(name: str) -> None:
    function, hyper = operator(name)
    x = random(3, DIM)
    rows = torch.stack([function(row, *hyper) for row in x])
    torch.testing.assert_close(torch.func.vmap(lambda row: function(row, *hyper))(x), rows)
    if "group" not in name:  # one group is the whole tensor
        torch.testing.assert_close(function(x, *hyper), rows)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: function(row, *hyper)))(x)
    torch.testing.assert_close(jacobians[1], torch.func.jacfwd(lambda row: function(row, *hyper))(x[1]))


@every_projection
def test_projecting_twice_changes_nothing(name: str) -> None:
    function, hyper = operator(name)
    once = function(3 * random(5, DIM), *hyper)
    torch.testing.assert_close(function(once, *hyper), once, rtol=1e-12, atol=1e-12)


def feasible(name: str, p: Tensor, hyper: tuple[Tensor, ...]) -> Tensor:
    """How far a point is from the set."""
    sums, positives = (p.sum(-1) - hyper[0].sum()).abs() if hyper else 0, (-p).relu().amax(-1)
    return {
        "non-negative": lambda: positives,
        "box": lambda: (hyper[0] - p).relu().amax(-1) + (p - hyper[1]).relu().amax(-1),
        "simplex": lambda: sums + positives,
        "sparse simplex": lambda: sums + positives + ((p > 0).sum(-1) - 3).relu(),
        "l1 ball": lambda: (p.abs().sum(-1) - hyper[0]).relu(),
        "l2 ball": lambda: (p.norm(dim=-1) - hyper[0]).relu(),
        "l2 sphere": lambda: (p.norm(dim=-1) - hyper[0]).abs(),
        "linf ball": lambda: (p.abs().amax(-1) - hyper[0]).relu(),
        "hyperplane": lambda: (p @ hyper[0] - hyper[1]).abs(),
        "half-space": lambda: (p @ hyper[0] - hyper[1]).relu(),
        "affine set": lambda: (p @ hyper[0].T - hyper[1]).norm(dim=-1),
    }[name.removesuffix(", inside")]()


@every_projection
def test_the_projection_is_in_the_set_and_no_point_of_it_is_nearer(name: str) -> None:
    function, hyper = operator(name)
    x = random(4, DIM)
    p = function(x, *hyper)
    assert feasible(name, p, hyper).max() <= 1e-12
    others = function(x + 0.3 * random(500, 4, DIM, seed=9), *hyper)
    assert ((others - x).norm(dim=-1) >= (p - x).norm(dim=-1) - 1e-12).all()


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "none": lambda p: 0 * p.sum(-1),
    "lasso": lambda p, weight: (weight * p.abs()).sum(-1),
    "non-negative lasso": lambda p, weight: torch.where((p < 0).any(-1), torch.inf, weight * p.sum(-1)),
    "elastic net": lambda p, lasso, ridge: lasso * (p.abs() + ridge / 2 * p.square()).sum(-1),
    "group lasso": lambda p, weight: weight * p.norm(dim=-1),
    "ridge": lambda p, weight: weight / 2 * p.square().sum(-1),
    "non-negative ridge": lambda p, weight: torch.where((p < 0).any(-1), torch.inf, weight / 2 * p.square().sum(-1)),
}


@pytest.mark.parametrize("name", PROXES)
def test_a_prox_minimizes_its_objective(name: str) -> None:
    function, hyper = operator(name)
    penalty = PENALTIES[name.split(",")[0]]
    x = random(DIM)
    value = lambda p: (p - x).square().sum(-1) / 2 + 0.7 * penalty(p, *hyper)  # noqa: E731
    p = function(x, *hyper)
    nearby = p + 10.0 ** -torch.arange(6.0).repeat(200)[:, None] * random(1200, DIM, seed=5) * (p != 0)
    assert (value(nearby) >= value(p) - 1e-12).all()
    assert (value(p + 0.1 * random(1000, DIM, seed=6)) >= value(p)).all()


def test_closed_forms_of_the_derivatives() -> None:
    x, v = random(DIM), random(DIM, seed=7)
    product = lambda f: torch.func.jvp(f, (x,), (v,))[1]  # noqa: E731
    support = (projection_simplex(x) > 0).double()
    assert 1 < support.sum() < DIM
    torch.testing.assert_close(product(projection_simplex), support * v - support * (support @ v) / support.sum())
    length = x.norm()
    torch.testing.assert_close(product(projection_l2_ball), (v - x * (x @ v) / length**2) / length)
    shrunk = (1 - 0.6 / length) * v + 0.6 * x * (x @ v) / length**3
    torch.testing.assert_close(product(partial(prox_group_lasso, hyper=0.6)), shrunk)
    slope = torch.func.jacrev(lambda weight: prox_lasso(x, weight, 0.5))(number(0.6))
    torch.testing.assert_close(slope, -0.5 * x.sign() * (x.abs() > 0.3))
    torch.testing.assert_close(prox_ridge(x, 3.0, 2.0), x / 7)  # the penalty is half the weight times the square


@every_operator
def test_no_nan_at_zero(name: str) -> None:
    function, hyper = operator(name)
    inputs = tuple(part.clone().requires_grad_() for part in (torch.zeros(DIM, dtype=torch.float64), *hyper))
    value = function(*inputs)
    gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
    assert all(torch.isfinite(part).all() for part in (value, *gradients) if part is not None)


def test_ties_and_equal_entries() -> None:
    torch.testing.assert_close(projection_simplex(torch.zeros(4)), torch.full((4,), 0.25))
    assert projection_simplex(torch.tensor([1e8, 0.0])).tolist() == [1, 0]
    sums = torch.tensor([1.0, 3.0])
    assert projection_simplex(torch.tensor([[2.0], [-2.0]]), sums).flatten().tolist() == [1, 3]
    assert projection_simplex(torch.tensor([torch.nan, 1.0])).isnan().any()


@pytest.mark.parametrize("radius", [0.0, -1.0, torch.tensor(-1.0)])
def test_empty_sets_are_refused(radius: float | Tensor) -> None:
    x = torch.ones(3)
    balls = (projection_l1_ball, projection_l2_ball, projection_l2_sphere, projection_linf_ball)
    for projection in (*balls, projection_simplex, projection_kl_simplex):
        with pytest.raises(ValueError, match="must be positive"):
            projection(x, radius)
    with pytest.raises(ValueError, match="lower bound exceeds"):
        projection_box(x, (1.0, radius))
    with pytest.raises(ValueError, match="nonzero must lie between 1 and 3, got 4"):
        projection_sparse_simplex(x, 4)
    for projection in (projection_hyperplane, projection_halfspace):
        with pytest.raises(ValueError, match="normal vector must not be 0"):
            projection(x, (torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match="rows of A are dependent"):
        projection_affine_set(x, (torch.ones(2, 3), torch.ones(2)))
