"""What all estimators have in common."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hpo.functional.bilevel.estimators import ESTIMATORS, Problem
from lightning_hpo.functional.bilevel.optimizer_steps import adam, functional_optimizer, sgd
from lightning_hpo.functional.bilevel.problem import Point, Tensors, identity

ADAM = functional_optimizer(adam, lr=0.05, eps=1e-3)
ONES = {"first": torch.ones(3, 4).double(), "last": torch.ones(4, 2).double()}
# Settings for the network, which is far from a solution and has an indefinite Hessian.
SETTINGS: dict[str, dict[str, Any]] = {
    "ift_cg": {"maxiter": 3, "tol": 0.0, "strict": None, "product": "gauss_newton"},
    "ift_normal_cg": {"maxiter": 5, "tol": 0.0, "strict": None},
    "ift_gmres": {"maxiter": 5, "tol": 0.0, "strict": None},
    "ift_bicgstab": {"maxiter": 3, "tol": 0.0, "strict": None},
    "ift_neumann": {"steps": 4, "alpha": 0.1},
    "ift_exact": {},
    "t1t2": {},
    "darts_fd": {},
    "sama": {"slope": ONES, "alpha": 0.1},
    "unrolled": {"steps": 3, "optimizer": ADAM},
    "truncated": {"steps": 3, "keep": 2, "optimizer": ADAM},
    "forward": {"steps": 3, "optimizer": ADAM},
    "es": {"steps": 3, "optimizer": ADAM, "pairs": 2},
    "pes": {"horizon": 4, "truncation": 2, "optimizer": ADAM, "pairs": 2},
}
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def test_the_list_is_complete() -> None:
    assert ESTIMATORS.keys() == SETTINGS.keys()


@every_estimator
def test_two_ranks_are_one_process_with_the_joined_batch(
    name: str, make: dict[str, Callable[..., Any]], ranks: Any
) -> None:
    estimate, settings = ESTIMATORS[name], SETTINGS[name]

    def two_calls(network: Any) -> list[Tensors]:
        first = estimate(network.problem, network.params, network.hparams, **settings)
        again = estimate(network.problem, network.params, network.hparams, first.state, **settings)
        return [first.gradients, again.gradients]

    joined = two_calls(make["network"]())
    rows = [slice(0, 6), slice(6, 12)]
    apart = [two_calls(make["network"](identity, part)) for part in rows]
    found = ranks.run(lambda rank, reduce: two_calls(make["network"](reduce, rows[rank])))
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=0.0)
    torch.testing.assert_close(found[0][0], joined[0], rtol=1e-12, atol=1e-12)
    # A second solve starts from a residual that is already small, where rounding shows.
    torch.testing.assert_close(found[0][1], joined[1], rtol=1e-8, atol=1e-10)
    mean = {key: (apart[0][0][key] + apart[1][0][key]) / 2 for key in joined[0]}
    assert any(not torch.allclose(mean[key], joined[0][key], rtol=1e-6) for key in mean)  # or nothing was shown


@pytest.mark.parametrize("name", ["ift_cg", "ift_exact", "unrolled", "t1t2"])
def test_two_ranks_with_finite_differences(name: str, make: dict[str, Callable[..., Any]], ranks: Any) -> None:
    settings = SETTINGS[name] | {"product": "fd"}

    def one(network: Any) -> Tensors:
        return ESTIMATORS[name](network.problem, network.params, network.hparams, **settings).gradients

    rows = [slice(0, 6), slice(6, 12)]
    found = ranks.run(lambda rank, reduce: one(make["network"](reduce, rows[rank])))
    torch.testing.assert_close(found[0], one(make["network"]()), rtol=1e-5, atol=1e-5)


@every_estimator
@pytest.mark.parametrize("grad_mode", [True, False])
def test_nothing_that_is_given_changes(name: str, grad_mode: bool, network: Any) -> None:
    params = {key: nn.Parameter(value.clone()) for key, value in network.params.items()}
    hparams = {key: value.clone().requires_grad_() for key, value in network.hparams.items()}
    for value in (*params.values(), *hparams.values()):
        value.grad = torch.full_like(value, 7.0)
    versions = [value._version for value in params.values()]
    expected = ESTIMATORS[name](network.problem, network.params, network.hparams, **SETTINGS[name]).gradients
    with torch.set_grad_enabled(grad_mode):
        result = ESTIMATORS[name](network.problem, params, hparams, **SETTINGS[name])
        ESTIMATORS[name](network.problem, params, hparams, result.state, **SETTINGS[name])
    torch.testing.assert_close(result.gradients, expected, rtol=0.0, atol=0.0)
    assert versions == [value._version for value in params.values()]
    for key, value in params.items():
        assert torch.equal(value, network.params[key])
    for value in (*params.values(), *hparams.values()):
        assert value.requires_grad
        assert torch.equal(value.grad, torch.full_like(value, 7.0))
    assert not any(value.requires_grad for value in result.gradients.values())
    assert all(result.gradients[key].shape == value.shape for key, value in hparams.items())


@every_estimator
def test_a_hyperparameter_that_nothing_reaches_is_named(name: str, network: Any) -> None:
    hparams = network.hparams | {"idle": torch.ones(2).double(), "lazy": torch.tensor(1.0).double()}
    with pytest.raises(ValueError, match="zero hypergradient: 'idle' is not reached .*; zero .* 'lazy' is not reached"):
        ESTIMATORS[name](network.problem, network.params, hparams, **SETTINGS[name])


@every_estimator
def test_one_loss_is_enough_to_be_reached(name: str, network: Any) -> None:
    """And a validation loss counts with its own slope, in full."""
    shifted = Problem(
        network.problem.train_loss,
        lambda w, h: network.problem.val_loss(w, h) + 3 * h["shift"],
        outputs=network.problem.outputs,
        output_loss=network.problem.output_loss,
    )
    hparams = network.hparams | {"shift": torch.tensor(0.5).double()}
    found = ESTIMATORS[name](shifted, network.params, hparams, **SETTINGS[name]).gradients
    if name in ("es", "pes"):
        assert found["shift"] != 0  # all are moved together
    else:
        torch.testing.assert_close(found.pop("shift"), torch.tensor(3.0).double())
        plain = ESTIMATORS[name](network.problem, network.params, network.hparams, **SETTINGS[name]).gradients
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"es", "pes"}))
def test_no_slope_in_the_parameters_gives_no_nan(name: str, network: Any) -> None:
    problem = Problem(
        network.problem.train_loss,
        lambda w, h: (w["first"] * 0).sum() + 2 * h["slope"],
        outputs=network.problem.outputs,
        output_loss=network.problem.output_loss,
    )
    found = ESTIMATORS[name](problem, network.params, network.hparams, **SETTINGS[name]).gradients
    torch.testing.assert_close(found["slope"], torch.tensor(2.0).double())
    assert torch.equal(found["decay"], torch.zeros(2).double())


@every_estimator
def test_wrong_tensors_are_all_listed(name: str, network: Any) -> None:
    with pytest.raises(TypeError, match=r"'first' is torch.int64, 'slope' is float, 'decay' is torch.bool"):
        ESTIMATORS[name](
            network.problem,
            network.params | {"first": torch.ones(3, 4, dtype=torch.int64)},
            {"slope": 0.5, "decay": torch.ones(2, dtype=torch.bool)},
            **SETTINGS[name],
        )
    with pytest.raises(ValueError, match="hparams must not be empty"):
        ESTIMATORS[name](network.problem, network.params, {}, **SETTINGS[name])


@every_estimator
def test_state_is_plain_enough_for_a_checkpoint(name: str, network: Any, tmp_path: Any) -> None:
    estimate, settings = ESTIMATORS[name], SETTINGS[name]
    first = estimate(network.problem, network.params, network.hparams, **settings)
    torch.save(first.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = estimate(network.problem, network.params, network.hparams, first.state, **settings)
    resumed = estimate(network.problem, network.params, network.hparams, state, **settings)
    torch.testing.assert_close(resumed.gradients, second.gradients, rtol=0.0, atol=0.0)


def test_a_name_that_one_rank_alone_reaches_is_reached(ranks: Any) -> None:
    """Weights of examples, for instance, of which each rank has its own."""

    def work(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensors:
        problem = Problem(
            lambda w, h: ((w["w"] - h[f"goal{rank}"]) ** 2).sum(), lambda w, h: (w["w"] ** 2).sum() / 2, reduce
        )
        hparams = {"goal0": torch.tensor(1.0), "goal1": torch.tensor(2.0)}
        return ESTIMATORS["ift_cg"](problem, {"w": torch.tensor([1.5])}, hparams).gradients

    for found in ranks.run(work):
        torch.testing.assert_close(found, {"goal0": torch.tensor(0.75), "goal1": torch.tensor(0.75)})


def test_all_ranks_refuse_what_none_reaches(ranks: Any) -> None:
    def work(rank: int, reduce: Callable[[Tensor], Tensor]) -> str:
        problem = Problem(lambda w, h: (w["w"] ** 2).sum(), lambda w, h: (w["w"] ** 2).sum(), reduce)
        with pytest.raises(ValueError) as caught:
            ESTIMATORS["ift_cg"](problem, {"w": torch.tensor([1.5])}, {"idle": torch.tensor(1.0)})
        return str(caught.value)

    assert ranks.run(work) == ["zero hypergradient: 'idle' is not reached by either loss"] * 2


@pytest.mark.parametrize("name", ["ift_cg", "darts_fd", "unrolled", "es"])
def test_losses_must_be_scalars_with_a_graph(name: str, network: Any) -> None:
    settings = SETTINGS[name] | ({"product": "exact"} if name == "ift_cg" else {})
    inputs: Any = network.params, network.hparams
    good = network.problem.train_loss
    many: Any = lambda w, h: w["first"]  # noqa: E731
    with pytest.raises(ValueError, match=r"train_loss must be a scalar tensor, got \(3, 4\)"):
        ESTIMATORS[name](Problem(many, good), *inputs, **settings)
    with pytest.raises(ValueError, match=r"train_loss depends on neither params nor hparams"):
        ESTIMATORS[name](Problem(lambda w, h: torch.ones(()), good), *inputs, **settings)
    if name != "es":
        with pytest.raises(ValueError, match="val_loss must be a scalar tensor, got float"):
            ESTIMATORS[name](Problem(good, lambda w, h: 1.0), *inputs, **settings)  # type: ignore[arg-type, return-value]


def test_a_problem_is_consistent() -> None:
    loss: Any = lambda w, h: w["w"].sum()  # noqa: E731
    with pytest.raises(ValueError, match="belong together"):
        Problem(loss, loss, outputs=loss)
    with pytest.raises(ValueError, match="give only one"):
        Problem(loss, loss, residual=lambda w, h: w, outputs=loss, output_loss=lambda z, w, h: z)


def test_a_point_shares_memory_but_no_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    point = Point({"w": 2 * weight}, {"a": torch.ones(1)})
    assert point.params["w"].is_leaf
    assert Point({"w": weight}, {"a": torch.ones(1)}).params["w"].data_ptr() == weight.data_ptr()


def test_unrolling_a_module_through_functional_call() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()

    def loss(params: Tensors, hparams: Tensors) -> Tensor:
        return (torch.func.functional_call(net, params, x) - y).square().mean() + sum(
            rate * value.square().sum() for rate, value in zip(hparams["decay"], params.values(), strict=True)
        )

    problem = Problem(loss, lambda w, h: (torch.func.functional_call(net, w, x + 1) - y).square().mean())
    hparams = {"decay": torch.full((4,), 0.1).double()}
    optimizer = functional_optimizer(sgd, lr=0.1)
    params = dict(net.named_parameters())
    reverse = ESTIMATORS["unrolled"](problem, params, hparams, steps=5, optimizer=optimizer).gradients
    ahead = ESTIMATORS["forward"](problem, params, hparams, steps=5, optimizer=optimizer).gradients
    torch.testing.assert_close(reverse, ahead, rtol=1e-10, atol=1e-12)
    assert all(value.grad is None for value in net.parameters())
