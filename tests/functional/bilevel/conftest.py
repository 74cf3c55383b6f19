"""Bilevel problems with known hypergradients, and ranks that are threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.problem import Problem, Tensors, identity

Reduce = Callable[[Tensor], Tensor]


@dataclass
class Ridge:
    """Half the mean squared error plus a decay for each feature; the loss on the other half of the rows."""

    x: Tensor
    y: Tensor
    problem: Problem
    hparams: Tensors

    def solution(self, log_decay: Tensor) -> Tensor:
        x, y = self.x[::2], self.y[::2]
        return torch.linalg.solve(x.T @ x / len(x) + torch.diag(log_decay.exp()), x.T @ y / len(x))

    @property
    def params(self) -> Tensors:
        w = self.solution(self.hparams["log_decay"])
        return {"a": w[:2].clone(), "b": w[2:].view(1, -1).clone()}

    @property
    def exact(self) -> Tensor:
        """Through the closed form of the solution."""
        theta = self.hparams["log_decay"].clone().requires_grad_()
        w = self.solution(theta)
        loss = self.problem.val_loss({"a": w[:2], "b": w[2:].view(1, -1)}, {"log_decay": theta})
        return torch.autograd.grad(loss, theta)[0]


def _weights(params: Tensors) -> Tensor:
    return torch.cat([params["a"], params["b"].flatten()])


def make_ridge(reduce: Reduce = identity, rows: slice = slice(None)) -> Ridge:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 5, generator=generator, dtype=torch.float64)
    y = (
        x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0], dtype=torch.float64)
        + torch.randn(48, generator=generator).double()
    )

    def train_loss(params: Tensors, hparams: Tensors) -> Tensor:
        w = _weights(params)
        error = 0.5 * (x[::2][rows] @ w - y[::2][rows]).square().mean()
        return error + 0.5 * (hparams["log_decay"].exp() * w * w).sum()

    def val_loss(params: Tensors, hparams: Tensors) -> Tensor:
        error = 0.5 * (x[1::2][rows] @ _weights(params) - y[1::2][rows]).square().mean()
        return error + 0.1 * hparams["log_decay"].square().sum()

    hparams = {"log_decay": torch.tensor([-2.0, -1.0, 0.0, -3.0, -0.5], dtype=torch.float64)}
    return Ridge(x, y, Problem(train_loss, val_loss, reduce), hparams)


@dataclass
class Network:
    """A small regression network that is nowhere near a solution; nothing about it is linear or symmetric."""

    problem: Problem
    params: Tensors
    hparams: Tensors


def make_network(reduce: Reduce = identity, rows: slice = slice(None)) -> Network:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(12, k, generator=generator, dtype=torch.float64) for k in (3, 2))
    first, last = (torch.randn(k, generator=generator, dtype=torch.float64) for k in ((3, 4), (4, 2)))

    def outputs(params: Tensors, hparams: Tensors) -> Tensor:
        return (hparams["slope"] * x[rows] @ params["first"]).tanh() @ params["last"]

    def output_loss(z: Tensor, params: Tensors, hparams: Tensors) -> Tensor:
        decay = sum(hparams["decay"][k] * params[name].square().sum() for k, name in enumerate(("first", "last")))
        return (z - y[rows]).square().mean() + decay

    def train_loss(params: Tensors, hparams: Tensors) -> Tensor:
        return output_loss(outputs(params, hparams), params, hparams)

    def val_loss(params: Tensors, hparams: Tensors) -> Tensor:
        return (outputs(params, hparams) - 1.5 * y.flip(0)[rows]).abs().pow(1.5).mean()

    problem = Problem(train_loss, val_loss, reduce, outputs=outputs, output_loss=output_loss)
    hparams = {"slope": torch.tensor(0.7).double(), "decay": torch.tensor([0.3, 0.2]).double()}
    return Network(problem, {"first": first, "last": last}, hparams)


class Ranks:
    """Threads that meet whenever one of them asks for a mean."""

    def __init__(self, size: int = 2) -> None:
        self.size, self.barrier, self.slots = size, Barrier(size, timeout=60), [torch.empty(0)] * size

    def reduce_of(self, rank: int) -> Reduce:
        def reduce(vector: Tensor) -> Tensor:
            self.slots[rank] = vector.detach().clone()
            self.barrier.wait()
            mean = torch.stack(self.slots).mean(0)
            self.barrier.wait()
            return mean

        return reduce

    def run(self, work: Callable[[int, Reduce], Any]) -> list[Any]:
        def guarded(rank: int) -> Any:
            try:
                return work(rank, self.reduce_of(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return [future.result() for future in [pool.submit(guarded, rank) for rank in range(self.size)]]


@pytest.fixture
def ridge() -> Ridge:
    return make_ridge()


@pytest.fixture
def network() -> Network:
    return make_network()


@pytest.fixture
def make() -> dict[str, Callable[..., Any]]:
    return {"ridge": make_ridge, "network": make_network}


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    lock, jvp = Lock(), torch.func.jvp

    def one_at_a_time(*args: Any) -> Any:  # its levels are those of the process; ranks are processes, only here threads
        with lock:
            return jvp(*args)

    monkeypatch.setattr(torch.func, "jvp", one_at_a_time)
    return Ranks()
