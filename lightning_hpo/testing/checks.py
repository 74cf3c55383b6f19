"""Checks that hold for every method: each raises ``AssertionError`` and says what to look at."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lightning_hpo.testing.compare import assert_same, module_structure
from lightning_hpo.testing.run import MakeCallback, MakeData, MakeModule, Outcome, fit, fit_two_ranks
from lightning_hpo.testing.tiny import TinyClassifier, TinyImages

__all__ = [
    "check_accumulation",
    "check_bf16",
    "check_fits_twice",
    "check_teardown",
    "check_trains",
    "check_two_ranks",
]


def require(condition: bool, message: str) -> None:
    """Raises ``AssertionError`` with ``message`` unless ``condition`` holds, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def require_learning(outcome: Outcome, steps: int) -> None:
    """Raises unless a run took its steps with finite losses, and finite knobs that moved."""
    require(outcome.global_step == steps, f"{steps} optimizer steps were asked for, {outcome.global_step} were counted")
    lost = [i for i, loss in enumerate(outcome.losses) if not math.isfinite(loss)]
    require(not lost, f"the training loss is not finite in micro-batches {lost}")
    last = outcome.knobs[-1]
    require(bool(last), "`hyperparameters()` is empty after training: nothing can be reported")
    wrong = {name: value for name, value in last.items() if not all(map(math.isfinite, _numbers(value)))}
    require(not wrong, f"hyperparameters that are not finite numbers: {wrong}")
    require(last != outcome.knobs[0], f"no hyperparameter moved in {steps} steps: {last}")


def _numbers(value: Any) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_trains(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 8,
) -> None:
    """The module trains, the method learns something and logs under its own prefix.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size.
        steps: Optimizer steps.

    Raises:
        AssertionError: If steps are lost, a loss or a hyperparameter is not finite, nothing moved, or nothing is logged
            under the method's prefix.
    """
    method = make_callback()
    outcome = fit(method, make_module(), make_data(8), max_steps=steps)
    require_learning(outcome, steps)
    prefix = type(method).__module__.rpartition(".")[2] + "/"
    require(
        any(key.startswith(prefix) for key in outcome.logged),
        f"nothing is logged under `{prefix}`; logged were {outcome.logged}",
    )


def check_two_ranks(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 6,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    compare: Sequence[str] = ("method", "module", "knobs"),
) -> None:
    """Two ranks end alike bit for bit, and like one process that sees the joined batches.

    The data must come so that the two batches of a step together are the batch of one process; Lightning's own sampler
    does not do that, since it shuffles on two ranks even where the loader does not. ``TinyImages`` shows a way.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size.
        steps: Optimizer steps.
        rtol: Relative tolerance between two ranks and one process, which add up in another order.
        atol: Absolute tolerance.
        compare: Parts of the outcome that must be those of one process; leave the method's state out if it says how
            batches are laid out.

    Raises:
        AssertionError: If a state differs, saying which.
    """
    first, second = fit_two_ranks(make_callback, make_module, make_data, batch_size=4, max_steps=steps)
    require_learning(first, steps)
    require(first.losses != second.losses, "both ranks saw the same losses: the data is not sharded, nothing is shown")
    hint = " (reduce statistics over ranks before deciding)"
    assert_same(first.method, second.method, f"the method's states on rank 0 and rank 1{hint}")
    assert_same(first.knobs, second.knobs, f"the hyperparameters on rank 0 and rank 1{hint}")
    assert_same(first.module, second.module, "the module's weights on rank 0 and rank 1")
    single = fit(make_callback(), make_module(), make_data(8), max_steps=steps)
    for what in compare:
        title = f"{what}: two ranks and one process on the joined batch"
        assert_same(getattr(first, what), getattr(single, what), title, rtol, atol)


def check_accumulation(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 5,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    compare: Sequence[str] = ("method", "module", "knobs"),
) -> None:
    """Two micro-batches a step end like one batch of twice the size.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module; its loss must be a mean over the batch.
        make_data: Makes the data for a batch size.
        steps: Optimizer steps.
        rtol: Relative tolerance, for the sums that are taken in another order.
        atol: Absolute tolerance.
        compare: Parts of the outcome that must agree; leave the method's state out if it says how batches are laid out.

    Raises:
        AssertionError: If a state differs, saying which, or the hyperparameters move within a window.
    """
    split = fit(make_callback(), make_module(), make_data(4), max_steps=steps, accumulate_grad_batches=2)
    whole = fit(make_callback(), make_module(), make_data(8), max_steps=steps)
    require_learning(split, steps)
    for what in [part for part in compare if part != "knobs"]:  # which are compared below
        title = f"{what}: two micro-batches of 4 and one batch of 8"
        assert_same(getattr(split, what), getattr(whole, what), title, rtol, atol)
    assert_same(split.knobs[1::2], split.knobs[:-1:2], "hyperparameters within a window, where no step is taken,")
    title = "hyperparameters at the ends of the windows: two micro-batches of 4 and one batch of 8"
    assert_same(split.knobs[::2], whole.knobs, title, rtol, atol)


def check_fits_twice(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 4,
) -> None:
    """The same callback and module can be trained again by a new Trainer.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size.
        steps: Optimizer steps of each fit.

    Raises:
        AssertionError: If the second fit does not learn, or leaves the module changed where the first did not.
    """
    method, module = make_callback(), make_module()
    first = fit(method, module, make_data(8), max_steps=steps)
    require_learning(first, steps)
    before = module_structure(module)
    second = fit(method, module, make_data(8), max_steps=steps)
    require(len(second.losses) == steps, f"the second fit took {len(second.losses)} of {steps} steps")
    require_learning(second, steps)
    assert_same(before, module_structure(module), "the module after the first and after the second fit")


def check_teardown(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 3,
    interrupted: bool = False,
) -> None:
    """After training the module is made of what it was made of: same parts, hooks, functions and ``requires_grad``.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size.
        steps: Optimizer steps.
        interrupted: Whether training ends in an exception instead of normally.

    Raises:
        AssertionError: Naming what the method left behind.
    """
    module = make_module()
    before = module_structure(module)
    fit(make_callback(), module, make_data(8), max_steps=steps + 1, kill_at=steps if interrupted else None)
    end = "an interrupted fit" if interrupted else "fit"
    assert_same(before, module_structure(module), f"the module before and after {end}")


def check_bf16(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 6,
) -> None:
    """Under ``bf16-mixed`` the method learns and keeps its own state in full precision.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size.
        steps: Optimizer steps.

    Raises:
        AssertionError: If something is not finite or does not move, or a saved tensor has less than 32 bits.
    """
    outcome = fit(make_callback(), make_module(), make_data(8), max_steps=steps, precision="bf16-mixed")
    require_learning(outcome, steps)
    narrow = [f"{where} is {tensor.dtype}" for where, tensor in _tensors(outcome.method, "") if tensor.itemsize < 4]
    require(not narrow, f"the method keeps part of its state in low precision: {'; '.join(narrow)}")


def _tensors(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{where}[{index}]")
