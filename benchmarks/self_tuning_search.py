"""Is it better to tune regularisation while one network is trained, or to search for it at the same number of epochs?

An AlexNet-like network on CIFAR-10 and an LSTM on SST-2, as in `docs/methods/self_tuning_networks.md`: STN and Δ-STN in
one run each beside random search and a tree-structured Parzen estimator (Optuna, `pip install lightning-hpo[search]`),
which divide the same epochs among their trials, and beside one run at the values that the others begin with. `--keep`
names a file to which every finished run is added, and whose runs are not run again.
"""

import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conclude, parse, show
from lightning.pytorch import Callback, Trainer
from self_tuning_images import image_task
from self_tuning_plots import draw_progress, draw_schedules, summary
from self_tuning_tasks import SearchTask
from self_tuning_text import text_task

from lightning_hpo import SelfTuning

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
TUNED: dict[str, dict[str, Any]] = {
    "STN": {"mode": "stn", "encoding": "identity"},
    "Δ-STN": {"mode": "delta"},
}
FIXED = ("random search", "TPE", "initial values")


class Course(Callback):
    """The lowest validation loss so far, with the test's at that epoch, and what it took to get there."""

    def __init__(self, task: SearchTask, method: SelfTuning | None = None) -> None:
        self.task, self.method = task, method
        self.epochs: list[dict[str, float]] = []
        self.values: list[dict[str, Any]] = []
        self.best: dict[str, float] = {"val_loss": float("inf")}
        self.cpu_s = self.scoring = 0.0  # of training, and of what happens here

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the clock."""
        self.began = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Scores the network as it stands."""
        now = time.process_time()
        self.cpu_s = now - self.began - self.scoring
        pl_module.eval()
        loss, _ = self.task.score(pl_module, 1)
        if loss < self.best["val_loss"]:
            test_loss, accuracy = self.task.score(pl_module, 2)
            self.best = {"val_loss": loss, "test_loss": test_loss, "test_accuracy": accuracy}
            self.best["best_epoch"] = trainer.current_epoch + 1
        pl_module.train()
        self.epochs.append({"val_loss": loss, "cpu_s": self.cpu_s})
        if self.method is not None:
            self.values.append({k: float(f"{v:.4g}") for k, v in self.method.hyperparameters().items()})
        self.scoring += time.process_time() - now


def fit(task: SearchTask, seed: int, epochs: int, fixed: Mapping[str, float] | None, **settings: Any) -> Course:
    """One run, at fixed values or at those that it tunes."""
    torch.manual_seed(seed)
    method = SelfTuning(seed=seed, **settings) if fixed is None else None
    course = Course(task, method)
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    callbacks: list[Callback] = [course] if method is None else [method, course]
    trainer = Trainer(
        max_epochs=epochs, check_val_every_n_epoch=10_000, gradient_clip_val=task.clip, callbacks=callbacks, **quiet
    )
    trainer.fit(task.build(fixed), *task.loaders(seed))
    return course


def random_search(task: SearchTask, seed: int, score: Callable[[dict[str, float]], float]) -> None:
    """Every trial is drawn from the same distribution."""
    draw = np.random.default_rng(seed)
    for _ in range(task.trials):
        score({name: range_.at(draw.random()) for name, range_ in task.ranges.items()})


def parzen_search(task: SearchTask, seed: int, score: Callable[[dict[str, float]], float]) -> None:
    """The first trials are random, the others follow what was good so far."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=task.random_trials)
    study = optuna.create_study(sampler=sampler)
    for _ in range(task.trials):
        trial = study.ask()
        chosen: dict[str, float] = {}
        for name, range_ in task.ranges.items():
            if range_.kind == "whole":
                chosen[name] = trial.suggest_int(name, int(range_.low), int(range_.high))
            else:
                chosen[name] = trial.suggest_float(name, range_.low, range_.high, log=range_.kind == "log")
        study.tell(trial, score(chosen))


def search(task: SearchTask, seed: int, epochs: int, look: Callable[..., None]) -> tuple[list[Course], list[Any]]:
    """The trials of a search, and their values."""
    courses: list[Course] = []
    values: list[dict[str, float]] = []

    def score(chosen: dict[str, float]) -> float:
        courses.append(fit(task, 1000 * seed + len(courses), epochs // task.trials, chosen))
        values.append({name: float(f"{value:.4g}") for name, value in chosen.items()})
        return courses[-1].best["val_loss"]

    look(task, seed, score)
    return courses, values


def run(task: SearchTask, method: str, seed: int) -> dict[str, Any]:
    """One method with one seed: what it found, and its course."""
    looks = {"random search": random_search, "TPE": parzen_search}
    if method in looks:
        courses, values = search(task, seed, task.epochs, looks[method])
    else:
        fixed = task.initial() if method == "initial values" else None
        courses = [fit(task, seed, task.epochs, fixed, **TUNED.get(method, {}), **task.tuning.get(method, {}))]
        values = courses[0].values
    best = min(courses, key=lambda course: course.best["val_loss"]).best
    return {
        "task": task.name,
        "method": method,
        "seed": seed,
        **{name: round(value, 4) for name, value in best.items()},
        "cpu_s": round(sum(course.cpu_s for course in courses), 1),
        "course": [[round(epoch["val_loss"], 4) for epoch in course.epochs] for course in courses],
        "seconds": [[round(epoch["cpu_s"], 1) for epoch in course.epochs] for course in courses],
        "values": values,
    }


def kept_runs(path: Path | None) -> list[dict[str, Any]]:
    """What an earlier call has finished."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def methods() -> list[str]:
    """All that can be run here."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        logging.getLogger(__name__).warning("TPE is left out: pip install lightning-hpo[search] brings Optuna")
        return [*TUNED, *(name for name in FIXED if name != "TPE")]
    return [*TUNED, *FIXED]


def report(chosen: Any, tasks: Sequence[SearchTask], runs: list[dict[str, Any]]) -> None:
    """Tables, pictures and the JSON file."""
    rows = summary(runs)
    columns = {"val_loss": ".4f", "test_loss": ".4f", "test_accuracy": ".4f", "cpu_s": ".1f"}
    show("Means over seeds", rows, {"task": "", "method": "", "seeds": "d", **columns})
    if not chosen.quick:
        for task in tasks:
            own = [r for r in runs if r["task"] == task.name]
            draw_schedules(task, own, list(TUNED), ASSETS / f"self_tuning_search_{task.short}_schedules.png")
        draw_progress(tasks, runs, ASSETS / "self_tuning_search_progress.png")
    single = [{k: v for k, v in r.items() if k not in ("course", "seconds", "values")} for r in runs]
    conclude(__file__, chosen, rows, runs=single)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything."""
    keep: tuple[str, dict[str, Any]] = ("--keep", {"type": Path, "help": "JSON lines of finished runs"})
    chosen = parse(__doc__, arguments, keep)
    path: Path | None = chosen.__dict__.pop("keep")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tasks = [image_task(chosen.quick), text_task(chosen.quick)]
    runs = kept_runs(path)
    for seed in range(1 if chosen.quick else 3):
        for task in tasks:
            for method in methods():
                if not any((r["task"], r["method"], r["seed"]) == (task.name, method, seed) for r in runs):
                    runs.append(run(task, method, seed))
                    if path is not None:
                        with path.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(runs[-1]) + "\n")
    report(chosen, tasks, runs)


if __name__ == "__main__":
    main()
