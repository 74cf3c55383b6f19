"""What does accuracy lose when tokens go: learned rates against rates by hand, at equal multiply-accumulates?

A small ViT is trained on each data set that is present (scikit-learn's digits always are; MNIST, Fashion-MNIST and
CIFAR-10 are looked for under `LIGHTNING_HPO_DATA`), then frozen, and rates are learned for several budgets, by DiffRate
(`learned`) and for tokens that merge in pairs (`learned pairs`: `matching="bipartite"`). At the cost of the schedule
that DiffRate learned the same network is compressed by hand, the same number of tokens in every block but the first,
which it spares, too: merging with the same matching (`constant merging`), pruning by class attention
(`constant pruning`) and pruning in random order (`random pruning`). ToMe's merging in pairs, the same number in every
block (`ToMe`), is given the cost of what was learned for pairs. Three seeds, which decide weights, order of the data
and, on the digits, the test images. Trained networks are kept in the system's folder for temporary files.
"""

import copy
import hashlib
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from common import RESULTS, conclude, console, device, parse, show, write
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from quality_plots import draw_accuracy, draw_groups, draw_rates
from torch import Tensor, nn

from lightning_hpo import TokenCompression, TokenCompressionSchedule, apply_token_compression
from lightning_hpo.demos import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageClassifier,
    MNISTDataModule,
)
from lightning_hpo.demos.image_data import ImageDataModule
from lightning_hpo.functional.compression.schedule import constant_at_macs
from lightning_hpo.nn.timm_models import describe
from lightning_hpo.nn.token_state import RankedTokens, TokenState

METHODS: dict[str, Literal["features", "bipartite"]] = {"learned": "features", "learned pairs": "bipartite"}
ASSETS = Path(__file__).parents[1] / "docs" / "assets"


@dataclass(frozen=True)
class Task:
    """A data set, the network trained on it and how long the rates learn; the network has 6 blocks of width 64.

    With `norm` queries and keys are normalised: a plain one of this width learns too slowly for the larger sets.
    """

    data: type[ImageDataModule]
    size: int
    patch: int
    channels: int = 1
    epochs: int = 3
    limit: int | None = 20_000
    shift: int = 0
    flip: bool = False
    steps: int = 800
    batch: int = 32
    norm: bool = False
    targets: tuple[float, ...] = (0.8, 0.7, 0.6, 0.4)

    def loaders(self, seed: int) -> ImageDataModule:
        """The images; the seed decides what is drawn where only part of them is used."""
        flip = {"flip": True} if self.flip else {}
        data = self.data(batch_size=self.batch, seed=seed, val_fraction=0.0, shift=self.shift, limit=self.limit, **flip)
        data.setup()
        return data

    def classifier(self) -> ImageClassifier:
        """The network, untrained."""
        grid = {"img_size": self.size, "patch_size": self.patch, "in_chans": self.channels}
        small = {"embed_dim": 64, "depth": 6, "num_heads": 4, "qk_norm": self.norm}
        regular: dict[str, Any] = (
            {"lr": 3e-3, "weight_decay": 0.2, "label_smoothing": 0.1} if self.norm else {"lr": 2e-3}
        )
        return ImageClassifier(model_args={**grid, **small}, warmup_steps=100, **regular)


TASKS = {
    "digits": Task(DigitsDataModule, 8, 2, epochs=60, limit=None),
    "MNIST": Task(MNISTDataModule, 28, 4, epochs=5, batch=64, norm=True, targets=(0.8, 0.6, 0.4)),
    "Fashion-MNIST": Task(
        FashionMNISTDataModule, 28, 4, epochs=10, batch=64, norm=True, flip=True, targets=(0.8, 0.6, 0.4)
    ),
    "CIFAR-10": Task(CIFAR10DataModule, 32, 4, 3, 20, batch=64, norm=True, flip=True, shift=2, targets=(0.8, 0.6, 0.4)),
}


class RandomOrder(TokenState):
    """Ranks patches at random."""

    def slice_tokens(self, x: Tensor, ranked: RankedTokens, prune: int, merge: int) -> Tensor:
        """Keeps ``prune`` tokens, whichever."""
        return super().slice_tokens(x, ranked._replace(scores=torch.rand_like(ranked.scores)), prune, merge)


class Course(Callback):
    """Writes down the kept tokens while they are learned."""

    def __init__(self, compression: TokenCompression, every: int) -> None:
        self.compression, self.every = compression, every
        self.steps: list[int] = []
        self.kept: list[tuple[int, ...]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Reads the schedule every so many steps."""
        if trainer.global_step % self.every == 0:
            self.steps.append(trainer.global_step)
            self.kept.append(self.compression.schedule.merge)


def trainer(**arguments: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator=device().type, devices=1, **{**quiet, **arguments})


def dense(name: str, task: Task, seed: int) -> tuple[ImageClassifier, ImageDataModule]:
    """The trained network, from the folder for temporary files where it is there already."""
    seed_everything(seed, verbose=False)
    classifier, data = task.classifier(), task.loaders(seed)
    told = {key: value for key, value in asdict(task).items() if key not in ("data", "steps", "targets")}
    digest = hashlib.sha256(json.dumps([name, seed, told, torch.__version__], default=str).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / "lightning_hpo_benchmarks" / f"{digest}.pt"
    if path.exists():
        classifier.load_state_dict(torch.load(path, weights_only=True))
        return classifier, data
    trainer(max_epochs=task.epochs).fit(classifier, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(classifier.state_dict(), path)
    return classifier, data


def accuracy(model: nn.Module, data: ImageDataModule) -> float:
    """Share of the test images that are right."""
    model = model.eval().to(device())
    right = total = 0
    with torch.inference_mode():
        for images, labels in data.test_dataloader():
            right += int((model(images.to(device())).argmax(-1).cpu() == labels).sum())
            total += len(labels)
    return right / total


def learn(
    classifier: LightningModule,
    data: ImageDataModule,
    target: float,
    steps: int,
    matching: Literal["features", "bipartite"] = "features",
) -> Course:
    """Rates for one budget."""
    data.batch_size = 64
    compression = TokenCompression(target=target, matching=matching)
    course = Course(compression, max(1, steps // 100))
    trainer(max_steps=steps, callbacks=[compression, course]).fit(classifier.train(), data)
    return course


def by_hand(model: nn.Module, macs: float, pairs: float) -> Iterable[tuple[str, nn.Module, TokenCompressionSchedule]]:
    """The same network under constant schedules of the same cost, that of learned pairs for ToMe."""
    layout = describe(model).layout
    kinds: tuple[tuple[str, Literal["merge", "prune"], Any, int], ...] = (
        ("constant merging", "merge", "features", 1),
        ("ToMe", "merge", "bipartite", 0),
        ("constant pruning", "prune", "features", 1),
        ("random pruning", "prune", "features", 1),
    )
    for name, kind, matching, first in kinds:
        tome = matching == "bipartite"
        schedule = constant_at_macs(layout.cost, pairs if tome else macs, layout.prefix, kind, first, halves=tome)
        network: Any = apply_token_compression(copy.deepcopy(model), schedule, matching=matching)
        if name == "random pruning":
            network.token_compression.__class__ = RandomOrder
        yield name, network, schedule


def run(name: str, task: Task, seed: int) -> tuple[list[dict[str, Any]], dict[float, Course]]:
    classifier, data = dense(name, task, seed)
    full = describe(classifier.model).layout.cost.full
    same = {"data": name, "seed": seed}
    rows: list[dict[str, Any]] = [
        same | {"target": 1.0, "method": "dense", "macs": 1.0, "accuracy": accuracy(classifier.model, data)}
    ]
    console.print(f"{name}, seed {seed}: dense {rows[0]['accuracy']:.2%}")
    courses: dict[float, Course] = {}
    for target in task.targets:
        forms, costs = [], []
        for method, matching in METHODS.items():
            seed_everything(seed, verbose=False)
            course = learn(classifier, data, target, task.steps, matching)
            schedule = course.compression.schedule
            courses.setdefault(target, course)  # of the first method, for the pictures
            forms.append((method, apply_token_compression(copy.deepcopy(classifier.model), schedule), schedule))
            costs.append(float(schedule.macs or 0))
        for method, network, used in [*forms, *by_hand(classifier.model, *costs)]:
            rows.append(same | {"target": target, "method": method, "macs": round((used.macs or 0) / full, 4)})
            rows[-1] |= {"accuracy": round(accuracy(network, data), 4), "prune": used.prune, "merge": used.merge}
        found = ", ".join(f"{row['method']} {row['accuracy']:.2%}" for row in rows[-6:])
        console.print(
            f"{name}, seed {seed}, target {target}: {rows[-6]['macs']:.4f} of the cost; {found}", soft_wrap=True
        )
    return rows, courses


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds."""
    keys = list(dict.fromkeys((row["data"], row["target"], row["method"]) for row in rows))
    table = []
    for data, target, method in keys:
        same = [row for row in rows if (row["data"], row["target"], row["method"]) == (data, target, method)]
        right = [100 * row["accuracy"] for row in same]
        spread = statistics.stdev(right) if len(right) > 1 else 0.0
        macs = statistics.mean(row["macs"] for row in same)
        figures = {"macs": round(macs, 4), "accuracy": round(statistics.mean(right), 2), "spread": round(spread, 2)}
        table.append({"data": data, "target": target, "method": method, "seeds": len(same)} | figures)
    return table


def earlier(names: Iterable[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and settings of the other data sets, from the file of the run before."""
    path = RESULTS / f"{Path(__file__).stem}.json"
    if not path.exists():
        return [], {}
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["data"] not in names]
    return rows, {name: text for name, text in found["settings"].items() if name not in names}


def present(names: Sequence[str]) -> dict[str, Task]:
    """Tasks whose data are there."""
    found = {}
    for name in names:
        try:
            replace(TASKS[name], limit=10).loaders(0)
        except FileNotFoundError as error:
            console.print(f"{name} left out: {error}")
        else:
            found[name] = TASKS[name]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    data = ("--data", {"nargs": "+", "choices": list(TASKS), "default": ["digits", "MNIST", "Fashion-MNIST"]})
    seeds = ("--seeds", {"type": int, "default": 3, "help": "3 by default"})
    steps = ("--steps", {"type": int, "default": None, "help": "steps of rate learning; 800 by default"})
    targets = ("--targets", {"type": float, "nargs": "+", "default": None, "help": "those of the data set by default"})
    assets = ("--assets", {"type": Path, "help": "folder of the pictures; docs/assets by default, none with --quick"})
    chosen = parse(__doc__, arguments, data, seeds, steps, targets, assets)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|LeafSpec|logging interval|across ranks is zero).*"
    )
    tasks = present(["digits"] if chosen.quick else chosen.data)
    if chosen.quick:
        tasks = {n: replace(t, epochs=1, limit=128, steps=4, targets=(0.7,)) for n, t in tasks.items()}
    asked = {"steps": chosen.steps, "targets": chosen.targets and tuple(chosen.targets)}
    tasks = {n: replace(t, **{key: value for key, value in asked.items() if value}) for n, t in tasks.items()}
    folder = chosen.assets or (None if chosen.quick else ASSETS)
    own: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for name, task in tasks.items():
        for seed in range(1 if chosen.quick else chosen.seeds):
            found, courses = run(name, task, seed)
            own += found
            others, settings = ([], {}) if chosen.quick else earlier(tasks)
            rows = others + own
            settings |= {name: str(task) for name, task in tasks.items()}
            write(__file__, chosen, rows, summary=summary(rows), settings=settings)  # it takes long: lose nothing
            if seed == 0 and folder is not None:
                draw_rates(folder / f"diffrate_rates_{name.lower()}.png", name, courses)
                classifier, loaders = dense(name, task, seed)
                draw_groups(folder / f"diffrate_groups_{name.lower()}.png", classifier.model, loaders, courses)
    columns = {
        "data": "",
        "target": ".1f",
        "method": "",
        "seeds": "d",
        "macs": ".4f",
        "accuracy": ".2f",
        "spread": ".2f",
    }
    means = summary(rows)
    show("Accuracy in %: mean and standard deviation over the seeds", means, columns)
    if folder is not None:
        draw_accuracy(folder / "diffrate_accuracy_macs.png", means)
    conclude(__file__, chosen, rows, summary=means, settings=settings)


if __name__ == "__main__":
    main()
