"""Checks of what a method writes into a checkpoint and reads from it."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_hpo.testing.checks import require, require_learning
from lightning_hpo.testing.compare import assert_same
from lightning_hpo.testing.run import MakeCallback, MakeData, MakeModule, Outcome, fit
from lightning_hpo.testing.tiny import TinyClassifier, TinyImages

__all__ = ["check_checkpoint_independent", "check_resume", "check_weights_only", "kill_and_resume"]


def kill_and_resume(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 10,
    kill_at: int = 5,
    **trainer: Any,
) -> tuple[Outcome, Outcome, Outcome]:
    """Trains without and with a break.

    The second run is killed and goes on in a third with a fresh Trainer, module, data and callback, from the checkpoint
    of the last whole optimizer step. The random number generators start elsewhere in the third run: what is drawn must
    be part of the state.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size; loaders must be resumable, like ``ResumableLoader``.
        steps: Optimizer steps in all.
        kill_at: Micro-batch at whose start the second run is killed, counted over epochs.
        trainer: Arguments of the Trainer, such as ``accumulate_grad_batches``.

    Returns:
        The outcomes of the uninterrupted, of the killed and of the resumed run.

    Raises:
        AssertionError: If the run was over, or had not taken a step, before it could be killed.
    """
    torch.manual_seed(1)
    whole = fit(make_callback(), make_module(), make_data(8), max_steps=steps, **trainer)
    require(0 < kill_at < len(whole.losses), f"micro-batch {kill_at} is not within the run of {len(whole.losses)}")
    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(dirpath=folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
        torch.manual_seed(1)
        killed = fit(make_callback(), make_module(), make_data(8), saver, kill_at=kill_at, max_steps=steps, **trainer)
        path = Path(folder) / "last.ckpt"
        require(path.exists(), f"no optimizer step had been taken before micro-batch {kill_at}; kill later")
        torch.manual_seed(2)
        resumed = fit(make_callback(), make_module(), make_data(8), ckpt_path=path, max_steps=steps, **trainer)
    return whole, killed, resumed


def check_resume(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 10,
    kill_at: int = 5,
    **trainer: Any,
) -> None:
    """A run that was killed and resumed ends like one that was not, bit for bit.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size; loaders must be resumable, like ``ResumableLoader``.
        steps: Optimizer steps in all.
        kill_at: Micro-batch at whose start the run is killed, counted over epochs.
        trainer: Arguments of the Trainer, such as ``accumulate_grad_batches``.

    Raises:
        AssertionError: Naming what differs. If the losses differ but the states do not, look at what the method draws
            at random or keeps outside ``_STATE``.
    """
    whole, _, resumed = kill_and_resume(make_callback, make_module, make_data, steps, kill_at, **trainer)
    require_learning(whole, steps)
    after = len(resumed.losses)
    still = whole.knobs[-after - 1] == whole.knobs[-1] and _same(resumed.first, whole.method)
    require(not still, "nothing was learned after the break, so nothing is shown")
    assert_same(whole.knobs[-after - 1 :], resumed.knobs, "hyperparameters of the uninterrupted and the resumed run")
    for what in ("method", "module", "optimizers", "global_step"):
        assert_same(getattr(whole, what), getattr(resumed, what), f"{what}: uninterrupted and resumed run")
    assert_same(whole.losses[-after:], resumed.losses, "losses of the uninterrupted and the resumed run")


def _same(first: Any, second: Any) -> bool:
    try:
        assert_same(first, second, "states")
    except AssertionError:
        return False
    return True


def check_weights_only(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 3,
) -> None:
    """The checkpoint holds the method's state and loads where classes are refused.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size.
        steps: Optimizer steps.

    Raises:
        AssertionError: If the state is missing or holds anything but tensors, containers, numbers and strings.
    """
    method = make_callback()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "end.ckpt"
        _train_and_save(make_module(), make_data, steps, path, method)
        try:
            checkpoint = torch.load(path, weights_only=True)
        except Exception as error:
            raise AssertionError(f"`torch.load(..., weights_only=True)` refuses the checkpoint: {error}") from error
        key = method.state_key
        require(bool(checkpoint["callbacks"].get(key)), f"the checkpoint holds no state under `{key}`")
        fit(make_callback(), make_module(), make_data(8), ckpt_path=path, max_steps=steps + 1)


def check_checkpoint_independent(
    make_callback: MakeCallback,
    make_module: MakeModule = TinyClassifier,
    make_data: MakeData = TinyImages,
    steps: int = 3,
) -> None:
    """Checkpoints written with the method load without it, and the other way round.

    Args:
        make_callback: Makes the callback.
        make_module: Makes the module.
        make_data: Makes the data for a batch size.
        steps: Optimizer steps.

    Raises:
        AssertionError: If the method adds to the module's or the optimizers' part of the checkpoint, or training cannot
            go on with the method taken away or added.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = Path(folder) / "ours.ckpt", Path(folder) / "plain.ckpt"
        _train_and_save(make_module(), make_data, steps, ours, make_callback())
        _train_and_save(make_module(), make_data, steps, plain)
        with_method, without = (torch.load(path, weights_only=True) for path in (ours, plain))
        hint = "checkpoints with and without the method"
        assert_same(sorted(with_method), sorted(without), f"entries of {hint}")
        shapes, plain_shapes = ({n: list(w.shape) for n, w in c["state_dict"].items()} for c in (with_method, without))
        assert_same(shapes, plain_shapes, f"weights in {hint} (own parameters, do not register them on the module)")
        groups, plain_groups = (
            [[len(group["params"]) for group in state["param_groups"]] for state in c["optimizer_states"]]
            for c in (with_method, without)
        )
        assert_same(groups, plain_groups, f"parameter groups in {hint}")
        for path, method in ((ours, None), (plain, make_callback())):
            saved = torch.load(path, weights_only=True)
            _continue(make_module(), make_data, steps, path, saved["state_dict"], method)


class _CompareAtStart(Callback):
    def __init__(self, expected: dict[str, Any], path: Path, steps: int) -> None:
        self.expected, self.title, self.steps = expected, f"weights in {path.name} and when training goes on", steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require(
            trainer.global_step == self.steps, f"training goes on from step {trainer.global_step}, not {self.steps}"
        )
        assert_same(dict(self.expected), dict(pl_module.state_dict()), self.title)


def _continue(
    module: LightningModule, make_data: MakeData, steps: int, path: Path, weights: dict[str, Any], method: Any
) -> None:
    at_start = _CompareAtStart(weights, path, steps)
    with warnings.catch_warnings():  # whether loaders can go on where they were is another question
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        outcome = fit(method, module, make_data(8), at_start, ckpt_path=path, max_steps=steps + 2)
    require(len(outcome.losses) == 2, f"{path.name}: training went on for {len(outcome.losses)} steps, not 2")


def _train_and_save(module: LightningModule, make_data: MakeData, steps: int, path: Path, method: Any = None) -> None:
    # Saved while training runs, as ModelCheckpoint does; afterwards the method has already been torn down.
    saver = ModelCheckpoint(
        dirpath=path.parent, filename=path.stem, every_n_train_steps=steps, enable_version_counter=False
    )
    fit(method, module, make_data(8), saver, max_steps=steps)
