"""Steps, time and accuracy of a batch that grows by itself, against batches chosen by hand.

Two-layer networks, SGD with momentum, Adam and Adagrad, the same number of samples for every run.

Digits (1437 training images, 40 epochs), where the first reading may already change the batch: learning rate rules
under the same policy, the norm test as in the paper's
code with the learning rate left alone, constant batches; beside them the figures of an independent implementation
written before this one, and whether ours agree. The gradient noise on such a run, by our estimate and by AdaptDL's
formula on the same gradients.

MNIST (60,000 training images, 10 epochs; looked for under `LIGHTNING_HPO_DATA`): `AdaptiveBatchSize()` as it comes,
with a loader of 64, against a constant 64, constant batches of its mean and of its final size, and a ramp in stages of
about the same mean. Looks at the test set are not timed; time is CPU time of one thread.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from batch_noise import compare_noise
from batch_plots import PICTURED, draw_courses, draw_loss, draw_noise, draw_rules, draw_steps
from batch_runs import OPTIMIZERS, Data, Method, Watch, be_quiet, digits, mnist, train
from common import RESULTS, conclude, console, parse, show, write

from lightning_hpo import AdaScale, LinearScaling, NormTest, NoScaling, SqrtScaling, StageWise

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
NO_CAP = 1e9
BY_HAND: dict[str, type[LinearScaling] | type[SqrtScaling]] = {
    "SGD": LinearScaling,
    "Adam": LinearScaling,
    "Adagrad": SqrtScaling,
}
ALMOST_ONE = 0.9999  # the plain test with eta 1 is refused: it would pass whatever the batch

# Steps and accuracy of the earlier implementation, and the differences allowed: share of the steps, points.
SCALED, ALONE, OFFICIAL = (0.25, 1.0), (0.25, 1.5), (None, 1.5)
BEFORE: dict[tuple[str, str], tuple[int, float, tuple[float | None, float]]] = {
    ("SGD", "none"): (148, 93.0, ALONE),
    ("SGD", "sqrt"): (145, 96.6, SCALED),
    ("SGD", "linear"): (197, 97.6, SCALED),
    ("SGD", "AdaScale"): (204, 97.6, SCALED),
    ("Adam", "none"): (187, 91.2, ALONE),
    ("Adam", "sqrt"): (146, 95.6, SCALED),
    ("Adam", "linear"): (205, 97.6, SCALED),
    ("Adam", "AdaScale"): (174, 97.7, SCALED),
    ("Adagrad", "none"): (142, 94.4, ALONE),
    ("Adagrad", "sqrt"): (243, 96.5, SCALED),
    ("Adagrad", "linear"): (365, 91.4, SCALED),
    ("Adagrad", "AdaScale"): (352, 97.3, SCALED),
    ("SGD", "AdaScale, plain 0.5"): (117, 97.6, SCALED),
    ("Adam", "AdaScale, plain 0.5"): (108, 96.4, SCALED),
    ("Adagrad", "AdaScale, plain 0.5"): (205, 96.9, SCALED),
    ("SGD", "constant 288, scaled"): (200, 98.0, SCALED),
    ("Adam", "constant 288, scaled"): (200, 97.6, SCALED),
    ("Adagrad", "constant 288, scaled"): (200, 96.3, SCALED),
    ("SGD", "constant 64"): (899, 96.6, OFFICIAL),
    ("SGD", "constant 288"): (200, 94.2, OFFICIAL),
    ("Adam", "constant 288"): (200, 92.3, OFFICIAL),
    ("Adagrad", "constant 8"): (7185, 96.1, OFFICIAL),
    ("Adagrad", "constant 64"): (899, 95.7, OFFICIAL),
    ("Adagrad", "constant 288"): (200, 94.8, OFFICIAL),
    ("Adagrad", "constant 830"): (70, 93.5, OFFICIAL),
    ("Adagrad", "constant 1437"): (40, 92.5, OFFICIAL),
    ("Adagrad", "plain 0.5, samples"): (69, 93.7, OFFICIAL),
    ("Adagrad", "plain 1, samples"): (204, 94.1, OFFICIAL),
    ("Adagrad", "plain 0.5, micro-batches"): (66, 93.5, OFFICIAL),
    ("Adagrad", "plain 1, micro-batches"): (178, 94.0, OFFICIAL),
    ("Adam", "plain 1, samples"): (349, 93.2, OFFICIAL),
    ("SGD", "plain 1, samples"): (220, 94.4, OFFICIAL),
}


class PlainAdaScale(AdaScale):
    """AdaScale of the plain test's statistics: noise that is left in the batch gradient counts as signal."""

    def factor(self, batch_size: float, base_batch_size: float, trace: float = 0.0, square: float = 0.0) -> float:
        """Smaller than without."""
        return super().factor(batch_size, base_batch_size, trace, square + trace / batch_size)


def digits_methods(optimizer: str) -> list[Method]:
    """Batches of 8 at first; four micro-batches of 2 where micro-batches are compared."""
    patient = {"estimator": "micro_batch", "max_batch_size": 1437, "max_micro_batch_size": 512}
    groups = patient | {"min_readings": 1}
    samples = {"estimator": "ghost", "max_samples": None, "max_batch_size": 1437, "max_micro_batch_size": 1437}
    four = Method("", batch=2, accumulation=4, drop_last=True)
    rules = {"none": NoScaling(), "sqrt": SqrtScaling(NO_CAP), "linear": LinearScaling(NO_CAP)}
    rules |= {"AdaScale": AdaScale(NO_CAP), "AdaScale, power 0.5": AdaScale(NO_CAP, power=0.5)}
    found = [replace(four, name=name, adaptive=groups | {"lr_scaling": rule}) for name, rule in rules.items()]
    found.append(replace(four, name="AdaScale, ten readings", adaptive=patient | {"lr_scaling": AdaScale(NO_CAP)}))
    found.append(replace(four, name="defaults", adaptive=patient))
    half, one = NormTest(0.5, debias=False), NormTest(ALMOST_ONE, debias=False)
    plain = groups | {"lr_scaling": PlainAdaScale(NO_CAP), "policy": half}
    found.append(replace(four, name="AdaScale, plain 0.5", adaptive=plain))
    official = {"lr_scaling": NoScaling(), "smoothing": 0.0, "growth": NO_CAP}
    for name, policy in (("0.5", half), ("1", one)):
        mine = official | {"policy": policy}
        found.append(Method(f"plain {name}, samples", batch=8, adaptive=samples | mine))
        found.append(replace(four, name=f"plain {name}, micro-batches", adaptive=groups | mine))
    found += [Method(f"constant {size}", size) for size in (8, 64, 288, 830, 1437)]
    scale = BY_HAND[optimizer](NO_CAP).factor(288, 8)
    return [*found, Method("constant 288, scaled", 288, scale=scale)]


def mnist_methods(optimizer: str) -> list[Method]:
    """Those that need to know of no other run."""
    wide = {"max_micro_batch_size": 1024}
    found = [
        Method("constant 64", 64),
        Method("AdaptiveBatchSize()", 64, adaptive={}),
        Method("micro-batches up to 1024", 64, adaptive=wide),
        Method("same, AdaScale(power=0.5)", 64, adaptive=wide | {"lr_scaling": AdaScale(power=0.5)}),
    ]
    if optimizer == "Adagrad":  # whose default is the square root
        rule = {"lr_scaling": AdaScale()}
        found.insert(2, Method("AdaptiveBatchSize(), AdaScale", 64, adaptive=rule))
        return [*found, Method("same, AdaScale", 64, adaptive=wide | rule)]
    return [*found, Method("same, sqrt", 64, adaptive=wide | {"lr_scaling": SqrtScaling()})]


def mnist_rivals(optimizer: str, mean: int, final: int, samples: int) -> list[Method]:
    """What one could choose by hand after having seen the batch that was found."""
    shares = (1 / 4, 1 / 2, 1, 2, 4)
    middle = mean * statistics.mean(1 / share for share in shares)  # so that samples by steps is the mean
    ramp = StageWise(tuple(max(1, round(middle * share)) for share in shares), samples=samples)
    rule = LinearScaling if optimizer == "SGD" else SqrtScaling
    return [
        Method("constant, same mean", mean),
        Method("constant, same mean, scaled", mean, scale=rule().factor(mean, 64)),
        Method("constant, same final, scaled", final, scale=rule().factor(final, 64)),
        Method("stages, same mean", 64, adaptive={"policy": ramp, "max_micro_batch_size": 1024}),
    ]


class Book:
    """Rows of all runs, written to the file as each one ends; those of another run of the script are kept."""

    def __init__(self, chosen: Any) -> None:
        self.chosen = chosen
        path = RESULTS / f"{Path(__file__).stem}.json"
        before = {} if chosen.quick or not path.exists() else json.loads(path.read_text(encoding="utf-8"))
        self.rows: list[dict[str, Any]] = before.get("rows", [])
        self.noise: list[dict[str, Any]] = before.get("noise", [])
        self.courses: list[dict[str, Any]] = before.get("courses", [])

    def asked(self, data: str, optimizer: str, method: Method, seed: int) -> bool:
        """Whether to run this; a run that the file has is kept where `--missing` is given."""
        key = (data, optimizer, method.name, seed)
        return not (self.chosen.missing and any(_key(row) == key for row in self.rows))

    def add(self, data: str, row: dict[str, Any], watch: Watch, course: bool) -> None:
        """One run's row, in the place of an earlier one's."""
        row = {"data": data, **row}
        self.rows = [other for other in self.rows if _key(other) != _key(row)] + [row]
        if course:
            self.courses = [other for other in self.courses if _key(other) != _key(row)]
            points = [[float(f"{value:.4g}") for value in asdict(point).values()] for point in watch.course]
            same = {name: row[name] for name in ("data", "optimizer", "method", "seed")}
            self.courses.append(same | {"points": points})
            self.courses.sort(key=lambda other: list(OPTIMIZERS).index(other["optimizer"]))
        self.save(write)

    def save(self, how: Callable[..., Any]) -> None:
        """The file, with what follows from the rows."""
        chosen = type(self.chosen)(**{**vars(self.chosen), "missing": False})
        facts = {"digits": self.digits(), "mnist": self.mnist(), "noise": self.noise, "courses": self.courses}
        how(__file__, chosen, self.rows, **facts)

    def _means(self, data: str) -> Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]:
        rows = [row for row in self.rows if row["data"] == data]
        for optimizer, method in dict.fromkeys((row["optimizer"], row["method"]) for row in rows):
            same = [row for row in rows if (row["optimizer"], row["method"]) == (optimizer, method)]
            right = [row["accuracy"] for row in same]
            spread = statistics.stdev(right) if len(right) > 1 else 0.0
            mean = {"optimizer": optimizer, "method": method, "seeds": len(same)}
            mean |= {"steps": round(_mean(same, "steps") or 0), "mean_batch": round(_mean(same, "mean_batch") or 0)}
            yield mean | {"accuracy": round(statistics.mean(right), 2), "spread": round(spread, 2)}, same

    def digits(self) -> list[dict[str, Any]]:
        """Means and medians over the seeds, beside the earlier implementation's means of three."""
        table = []
        for mean, same in self._means("digits"):
            key = (mean["optimizer"], mean["method"])
            mean["accuracies"] = [row["accuracy"] for row in same]
            mean |= {f"{name}_median": _median(same, name) for name in ("train_loss", "steps", "accuracy")}
            mean |= {"steps_before": None, "accuracy_before": None, "agrees": None, "agrees_3": None}
            if key in BEFORE:
                mean["steps_before"], mean["accuracy_before"], _ = BEFORE[key]
                mean["agrees"] = _agrees(key, mean["steps_median"], mean["accuracy_median"])
                first = [row for row in same if row["seed"] < 3]
                mean["agrees_3"] = _agrees(key, _mean(first, "steps") or 0, _mean(first, "accuracy") or 0)
            table.append(mean)
        order = [(optimizer, method.name) for optimizer in OPTIMIZERS for method in digits_methods(optimizer)]
        return sorted(table, key=lambda row: order.index((row["optimizer"], row["method"])))

    def mnist(self) -> list[dict[str, Any]]:
        """Means over the seeds, beside those of a constant 64."""
        table = []
        for mean, same in self._means("MNIST"):
            mean["last_batch"] = round(_mean(same, "last_batch") or 0)
            mean |= {name: _mean(same, name) for name in ("cpu_s", "wall_s")}
            mean |= {name: _mean(same, name) for name in ("target_steps", "target_samples", "target_cpu_s")}
            table.append(mean)
        base = {row["optimizer"]: row for row in table if row["method"] == "constant 64"}
        for row in table:
            if whole := base.get(row["optimizer"]):
                row["fewer"] = round(whole["steps"] / row["steps"], 1)
                row["lost"] = round(whole["accuracy"] - row["accuracy"], 2)
        return sorted(table, key=lambda row: list(OPTIMIZERS).index(row["optimizer"]))


def _key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["data"], row["optimizer"], row["method"], row["seed"]


def _agrees(key: tuple[str, str], steps: float, accuracy: float) -> str:
    before, right, (share, points) = BEFORE[key]
    near = share is None or abs(steps - before) <= share * before
    close = abs(accuracy - right) <= points + 1e-9
    return "yes" if near and close else "accuracy" if close else "steps" if near else "no"


def _median(rows: Sequence[dict[str, Any]], name: str) -> float:
    return round(statistics.median(row[name] for row in rows), 4)


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows]
    return None if None in values else round(statistics.mean(values), 2)


def run_digits(book: Book, seeds: int, data: Data) -> None:
    """Every method, the seeds first, so that an early end leaves whole tables."""
    for seed in range(seeds):
        for optimizer in OPTIMIZERS:
            for method in digits_methods(optimizer):
                if book.asked("digits", optimizer, method, seed):
                    row, watch = train(data, optimizer, method, seed)
                    book.add("digits", row, watch, course=False)


def run_mnist(book: Book, seeds: int, data: Data) -> None:
    """What comes as it is, and then the rivals that are made of its figures."""
    samples = len(data.train) * data.epochs
    for seed in range(seeds):
        for optimizer in OPTIMIZERS:
            for method in mnist_methods(optimizer):
                if book.asked("MNIST", optimizer, method, seed):
                    row, watch = train(data, optimizer, method, seed)
                    book.add("MNIST", row, watch, course=seed == 0 and method.name in PICTURED)
            key = ("MNIST", optimizer, "AdaptiveBatchSize()", seed)
            found = next(row for row in book.rows if _key(row) == key)
            for method in mnist_rivals(optimizer, round(found["mean_batch"]), found["last_batch"], samples):
                if book.asked("MNIST", optimizer, method, seed):
                    row, watch = train(data, optimizer, method, seed)
                    book.add("MNIST", row, watch, course=seed == 0 and method.name in PICTURED)


def draw(book: Book, folder: Path) -> None:
    """All pictures for which there are figures."""
    if courses := [course for course in book.courses if course["data"] == "MNIST"]:
        draw_courses(folder / "adadagrad_batches_mnist.png", courses)
        draw_loss(folder / "adadagrad_loss_mnist.png", courses)
        draw_steps(folder / "adadagrad_steps_mnist.png", book.mnist())
    if book.digits():
        draw_rules(folder / "adadagrad_rules_digits.png", book.digits())
        draw_noise(folder / "adadagrad_noise_digits.png", book.noise)


def main(arguments: Sequence[str] | None = None) -> None:
    data = ("--data", {"nargs": "+", "choices": ["digits", "MNIST"], "default": ["digits", "MNIST"]})
    seeds = ("--seeds", {"type": int, "default": 3, "help": "of MNIST; 3 by default"})
    repeats = ("--repeats", {"type": int, "default": 10, "help": "seeds of the digits, which are quick; 10 by default"})
    missing = ("--missing", {"action": "store_true", "help": "only what the JSON file does not have yet"})
    assets = ("--assets", {"type": Path, "help": "folder of the pictures; docs/assets by default, none with --quick"})
    chosen = parse(__doc__, arguments, data, seeds, repeats, missing, assets)
    be_quiet()
    book = Book(chosen)
    if "digits" in chosen.data:
        held = digits(1 if chosen.quick else 40)
        run_digits(book, 1 if chosen.quick else chosen.repeats, held)
        if not (chosen.missing and book.noise):
            book.noise = compare_noise(held)
    if "MNIST" in chosen.data and not chosen.quick:
        try:
            found = mnist()
        except FileNotFoundError as error:
            console.print(f"MNIST left out: {error}")
        else:
            run_mnist(book, chosen.seeds, found)
    if folder := chosen.assets or (None if chosen.quick else ASSETS):
        draw(book, folder)
    columns = {"optimizer": "", "method": "", "steps": "d", "mean_batch": "d", "accuracy": ".2f", "spread": ".2f"}
    before = {"steps_before": "d", "accuracy_before": ".1f", "agrees": "", "agrees_3": ""}
    show("Digits", book.digits(), columns | {"accuracy_median": ".2f"} | before)
    show("Noise of the gradient", book.noise, dict.fromkeys(book.noise[0], ".4g") if book.noise else {"samples": ""})
    time = {"last_batch": "d", "fewer": ".1f", "lost": ".2f", "cpu_s": ".1f", "target_steps": ".0f"}
    show("MNIST", book.mnist(), columns | time | {"target_samples": ".0f", "target_cpu_s": ".1f"})
    book.save(conclude)


if __name__ == "__main__":
    main()
