"""The hypergradients of other libraries on the problem of `hypergradient_cost.py`, each through its public functions.

A library that is not installed, or lacks a function, makes its methods absent. `pip install lightning-hpo[peers]`
brings `torchopt` and `higher`. The other two are folders of their repositories, to put on the path. hypertorch (Grazzi
et al., 2020; package `hypergrad`) is in no package index: those of either name there are other projects. For Python
3.11 and later the index has betty 0.1.1, whose metadata a current pip refuses; it lacks `sama`, and its conjugate
gradients take other directions. The figures are those of betty 0.2.1.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "Estimate",
    "Peer",
    "PeerTask",
    "finite_difference_peers",
    "implicit_peers",
    "peer_versions",
    "series_peers",
    "unrolled_peers",
]

Estimate = Callable[[], Sequence[Tensor]]  # the hypergradients by decay and by weight


class PeerTask(Protocol):
    """What a library needs to know of the problem."""

    lr: float
    start: list[Tensor]
    hparams: dict[str, Tensor]
    adam_state: list[dict[str, Tensor]]
    adam_settings: dict[str, Any]

    def train(self, weights: Sequence[Tensor], decay: Tensor, weight: Tensor) -> Tensor:
        """The training loss."""
        ...

    def val(self, weights: Sequence[Tensor]) -> Tensor:
        """The validation loss."""
        ...


class Peer:
    """One library's way to one hypergradient, made when it is known to be there.

    Args:
        label: Library and method.
        module: Where its function is.
        name: What it is called.
        make: From the function, the task and a number (of products, or of inner steps) to the estimate.
    """

    def __init__(self, label: str, module: str, name: str, make: Callable[[Any, PeerTask, int], Estimate]) -> None:
        self.label, self.module, self.name, self._make = label, module, name, make

    def missing(self) -> str | None:
        """Why it cannot be measured; None where it can."""
        try:
            found = importlib.import_module(self.module)
        except ImportError as error:
            return f"{self.label}: {error}"
        return None if hasattr(found, self.name) else f"{self.label}: {self.module} has no `{self.name}`"

    def estimate(self, task: PeerTask, number: int) -> Estimate:
        """The function to time."""
        return self._make(getattr(importlib.import_module(self.module), self.name), task, number)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in tensors]


def _hyper_leaves(task: PeerTask) -> list[Tensor]:
    return _leaves(list(task.hparams.values()))


# hypertorch: lists of tensors, the inner problem as a fixed-point map


def _hypertorch(function: Any, task: PeerTask, number: int) -> Estimate:
    hparams = _hyper_leaves(task)

    def step(weights: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(task.train(weights, *given), list(weights), create_graph=True)
        return [value - task.lr * grad for value, grad in zip(weights, grads, strict=True)]

    def outer(weights: Sequence[Tensor], _: Sequence[Tensor]) -> Tensor:
        return task.val(weights)

    return lambda: function(task.start, hparams, number, step, outer, tol=0.0, set_grad=False)


def _hypertorch_fixed_point(function: Any, task: PeerTask, number: int) -> Estimate:
    return _hypertorch(function, task, number + 1)  # begins from zero: its first product is none


def _hypertorch_unroll(function: Any, task: PeerTask, number: int) -> Estimate:
    hparams = _hyper_leaves(task)
    descent = importlib.import_module("hypergrad.diff_optimizers").GradientDescent
    optimizer = descent(lambda weights, given: task.train(weights, *given), step_size=task.lr)

    def estimate() -> Sequence[Tensor]:
        weights: Sequence[Tensor] = _leaves(task.start)
        for _ in range(number):
            weights = optimizer(weights, hparams)
        return function(weights, hparams, lambda found, _: task.val(found), set_grad=False)

    return estimate


def _hypertorch_reverse(function: Any, task: PeerTask, number: int) -> Estimate:
    hparams = _hyper_leaves(task)
    descent = importlib.import_module("hypergrad.diff_optimizers").GradientDescent
    optimizer = descent(lambda weights, given: task.train(weights, *given), step_size=task.lr)

    def estimate() -> Sequence[Tensor]:
        history = [_leaves(task.start)]
        for _ in range(number):
            new = optimizer(history[-1], hparams, create_graph=False)
            history.append([value.detach().requires_grad_() for value in new])
        return function(history, hparams, [optimizer] * number, lambda found, _: task.val(found), set_grad=False)

    return estimate


# TorchOpt: a solver with a root condition


def _torchopt(solve: Any, task: PeerTask, number: int) -> Estimate:
    custom_root = importlib.import_module("torchopt.diff.implicit").custom_root
    hparams = _hyper_leaves(task)

    def condition(weights: tuple[Tensor, ...], decay: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(task.train)(weights, decay, weight)

    @custom_root(condition, argnums=(1, 2), solve=solve(maxiter=number, rtol=0.0))
    def solution(weights: tuple[Tensor, ...], decay: Tensor, weight: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG001
        return weights

    start = tuple(task.start)
    return lambda: torch.autograd.grad(task.val(solution(start, *hparams)), hparams)


# betty: two problems, the lower with its loss and its weights


def _betty(function: Any, task: PeerTask, number: int) -> Estimate:
    weights, hparams = _leaves(task.start), _hyper_leaves(task)  # its weights are moved in place
    numbers = {"cg_iterations": number, "neumann_iterations": number, "neumann_alpha": task.lr}
    alphas = {"cg_alpha": 1.0, "darts_alpha": 0.01, "sama_adam_alpha": 1.0}
    more = {"darts_multitask": False, "sama_multitask": False}
    index = {id(value): number for number, value in enumerate(weights)}
    states = [{**state, "last_grad": state["grad"]} for state in task.adam_state]
    settings = task.adam_settings
    group = {"lr": settings["lr"], "betas": (settings["beta1"], settings["beta2"]), "eps": settings["eps"]}
    lower = SimpleNamespace(
        config=SimpleNamespace(**numbers, **alphas, **more),
        paths=[],
        cur_batch=None,
        optimizer=torch.optim.Adam(weights),
        training_step_exec=lambda _: task.train(weights, *hparams),
        parameters=lambda: weights,
        trainable_parameters=lambda: weights,
        meta_trainable_parameters=lambda: weights,
        get_opt_param_group_for_param=lambda _: group,
        get_opt_state_for_param=lambda value: states[index[id(value)]],
        _strategy="default",
    )
    upper = SimpleNamespace(trainable_parameters=lambda: hparams)
    sync = [False] if "sync" in inspect.signature(function).parameters else []

    def estimate() -> Sequence[Tensor]:
        vector = torch.autograd.grad(task.val(weights), weights)
        return function(vector, lower, upper, *sync)

    return estimate


# higher: a module and an optimizer that keep their graph


def _higher(context: Any, task: PeerTask, number: int) -> Estimate:
    hparams = _hyper_leaves(task)
    module = nn.ParameterList([nn.Parameter(value.clone()) for value in task.start])
    optimizer = torch.optim.SGD(module.parameters(), lr=task.lr)

    def estimate() -> Sequence[Tensor]:
        with context(module, optimizer) as (network, steps):
            for _ in range(number):
                steps.step(task.train(list(network.parameters()), *hparams))
            return torch.autograd.grad(task.val(list(network.parameters())), hparams)

    return estimate


def implicit_peers() -> list[Peer]:
    """Conjugate gradients, a fixed number of steps."""
    return [
        Peer("hypertorch CG", "hypergrad.hypergradients", "CG", _hypertorch),
        Peer("TorchOpt custom_root, cg", "torchopt.linear_solve", "solve_cg", _torchopt),
        Peer("betty cg", "betty.hypergradient.cg", "cg", _betty),
    ]


def series_peers() -> list[Peer]:
    """Neumann series, a fixed number of products."""
    return [
        Peer("hypertorch neumann", "hypergrad.hypergradients", "neumann", _hypertorch),
        Peer("hypertorch fixed_point", "hypergrad.hypergradients", "fixed_point", _hypertorch_fixed_point),
        Peer("betty neumann", "betty.hypergradient.neumann", "neumann", _betty),
    ]


def finite_difference_peers() -> dict[str, Peer]:
    """Two gradients beside that of the validation loss, by the name of our estimator."""
    return {
        "darts_fd": Peer("betty darts", "betty.hypergradient.darts", "darts", _betty),
        "sama": Peer("betty sama", "betty.hypergradient.sama", "sama", _betty),
    }


def unrolled_peers() -> list[Peer]:
    """Reverse mode through the inner steps."""
    return [
        Peer("higher", "higher", "innerloop_ctx", _higher),
        Peer("hypertorch reverse_unroll", "hypergrad.hypergradients", "reverse_unroll", _hypertorch_unroll),
        Peer("hypertorch reverse", "hypergrad.hypergradients", "reverse", _hypertorch_reverse),
    ]


def peer_versions() -> dict[str, str | None]:
    """What was measured: a version of the index, or that it came from elsewhere; None where it is not there."""
    found: dict[str, str | None] = {}
    for module, package in {"hypergrad": "", "torchopt": "torchopt", "betty": "betty-ml", "higher": "higher"}.items():
        try:
            importlib.import_module(module)
            found[module] = version(package) if package else "from its repository"
        except PackageNotFoundError:
            found[module] = "from its repository"
        except ImportError:
            found[module] = None
    return found
