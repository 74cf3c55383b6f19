"""What does a learned regulariser gain over a grid search, and for how much work?

Smoothed total variation has two parameters, its weight and its smoothing. A grid of 10 by 10 is compared with MAID on
the same training crops, and with a field of experts, whose 624 parameters no grid can search. All are scored on Set12,
which none has seen. Work is gradients of the lower losses and iterations of conjugate gradients, of all crops together
as one; each takes longer with a field of experts. `gain_db` is over the best of the grid.

1. `rows`: noisy images; the grid; total variation by MAID, which ends at the work of the grid at the latest; fields of
   experts at the work of the grid, and after longer.
2. `images`: every image of Set12.
3. `grid`: what the grid was, and which point was best.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import conclude, parse, show
from denoising_plots import draw_images, draw_work
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from lightning_hpo.demos.denoising_data import DenoisingDataModule, NoisyPair, PhotoDenoisingDataModule
from lightning_hpo.functional.bilevel.denoising import FieldOfExperts, Regularizer, TotalVariation, denoising_problem
from lightning_hpo.functional.bilevel.lower_solvers import lbfgs
from lightning_hpo.functional.bilevel.maid import MAID, MAIDState

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
ACCURACY = 0.01  # of a crop in the grid; the loss is known to a hundredth then
ACCELERATED: dict[str, Any] = {"bb_init": True, "nonmonotone": True, "solver": lbfgs, "alpha0": 1.0}
Course = list[dict[str, float]]


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image, in decibels."""
    return peak_signal_noise_ratio(images, clean, data_range=1.0, reduction="none", dim=(1, 2))


class Study:
    """Training crops, held-out crops and test images, and what denoising them gives."""

    def __init__(self, data: DenoisingDataModule) -> None:
        data.setup()
        self.train, self.val = (
            NoisyPair(*next(iter(loader))) for loader in (data.train_dataloader(), data.val_dataloader())
        )
        self.test = [data.test_set[i] for i in range(len(data.test_set))]

    def denoise(self, pair: NoisyPair, regularizer: Regularizer, theta: Tensor) -> Tensor:
        """Accurate to a thousandth of the brightest grey for each pixel."""
        lower = denoising_problem(*pair, regularizer).lower
        return lbfgs(lower, theta, pair.noisy, 1e-3 * pair.noisy[0].numel() ** 0.5).x

    def scores(self, regularizer: Regularizer | None, theta: Tensor) -> tuple[dict[str, float], list[Tensor]]:
        """Mean ratios, and the test images."""
        one = [NoisyPair(noisy[None], clean[None]) for noisy, clean in self.test]
        parts = [self.train, self.val, *one]
        found = [pair.noisy if regularizer is None else self.denoise(pair, regularizer, theta) for pair in parts]
        ratios = [psnr(images, pair.clean) for images, pair in zip(found, parts, strict=True)]
        means = dict(zip(("train_db", "val_db"), (r.mean().item() for r in ratios), strict=False))
        return means | {"set12_db": torch.cat(ratios[2:]).mean().item()}, [images[0] for images in found[2:]]

    def grid(self, points: int) -> tuple[Tensor, dict[str, Any]]:
        """The best of a grid by the loss that MAID minimises; every point begins where its neighbour ended."""
        problem = denoising_problem(*self.train, TotalVariation())
        weights, smoothings = (torch.linspace(*ends, points) for ends in ((-5.0, -0.5), (-7.0, -2.5)))
        x, work, best, began = self.train.noisy, 0, (float("inf"), torch.zeros(2)), time.process_time()
        for i, smoothing in enumerate(smoothings.flip(0)):
            for weight in weights.flip(0) if i % 2 else weights:
                theta = torch.stack([weight, smoothing]).double()
                found = lbfgs(problem.lower, theta, x, ACCURACY)
                x, work = found.x, work + found.iterations
                loss = problem.upper_at(x).values.mean().item()
                best = min(best, (loss, theta), key=lambda pair: pair[0])
        spent = time.process_time() - began
        facts = {"points": points**2, "work": work, "cpu_s": spent, "loss": best[0]}
        return best[1], facts | {"log_weight": best[1][0].item(), "log_smoothing": best[1][1].item()}

    def learn(
        self, regularizer: Regularizer, theta: Tensor, most: Sequence[int], **settings: Any
    ) -> tuple[list[tuple[MAIDState, float]], Course]:
        """The states with at most so much work and the seconds that they took, and the course of the whole run."""
        maid = MAID(denoising_problem(*self.train, regularizer), **settings)
        began, course, ends = time.process_time(), [], []
        state, spent = maid.init(theta, self.train.noisy), 0.0
        for limit in most:
            while state.status == "running":
                after = maid.step(state)
                if after.work > limit:
                    break
                state, spent = after, time.process_time() - began
                ratio = psnr(state.x, self.train.clean).mean().item()
                course.append({"work": state.work, "loss": (state.lower + state.upper) / 2, "train_db": ratio})
            ends.append((state, spent))
        return ends, course


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(
        __doc__,
        arguments,
        ("--root", {"help": "folder with denoising/bsd68 and denoising/set12; LIGHTNING_HPO_DATA by default"}),
        ("--crops", {"type": int, "default": 20, "help": "training crops of 64 by 64"}),
        ("--filters", {"type": int, "default": 24, "help": "experts; the paper has 48, of size 7"}),
        ("--size", {"type": int, "default": 5, "help": "side of their filters"}),
        ("--work", {"type": int, "default": 7_000, "help": "largest work for the field of experts"}),
        ("--assets", {"type": Path, "help": "folder of the pictures; docs/assets by default, none with --quick"}),
    )
    quick = chosen.quick
    photos = PhotoDenoisingDataModule(size=32, crops=4, val_crops=2)
    study = Study(photos if quick else DenoisingDataModule(chosen.root, crops=chosen.crops))
    variation = TotalVariation()
    experts = FieldOfExperts(*(3, 3) if quick else (chosen.filters, chosen.size))
    best, grid = study.grid(3 if quick else 10)
    start = torch.full((2,), -5.0).double()
    ((tv, tv_s),), tv_course = study.learn(variation, start, [grid["work"]], solver=lbfgs)
    (early, late), course = study.learn(
        experts, experts.start(dtype=start.dtype), [grid["work"], 200 if quick else chosen.work], **ACCELERATED
    )
    candidates: dict[str, tuple[Regularizer | None, Tensor, float, float]] = {
        "noisy": (None, start[:0], 0, 0.0),
        "total variation, best of the grid": (variation, best, grid["work"], grid["cpu_s"]),
        "total variation, MAID": (variation, tv.theta, tv.work, tv_s),
        "experts, MAID, the grid's work": (experts, early[0].theta, early[0].work, early[1]),
        "experts, MAID": (experts, late[0].theta, late[0].work, late[1]),
    }
    rows: list[dict[str, Any]] = []
    images: dict[str, list[Tensor]] = {}
    for name, (regularizer, theta, work, spent) in candidates.items():
        figures, images[name] = study.scores(regularizer, theta)
        rows.append({"setting": name, "parameters": len(theta), **figures, "work": work, "cpu_s": spent})
    base = rows[1]["set12_db"]
    rows = [row | {"gain_db": row["set12_db"] - base} for row in rows]
    table = [
        {"image": i + 1, "side": len(pair.clean)}
        | {name: psnr(found[i][None], pair.clean[None]).item() for name, found in images.items()}
        for i, pair in enumerate(study.test)
    ]
    decibels = dict.fromkeys(("train_db", "val_db", "set12_db", "gain_db"), ".2f")
    show("Denoising", rows, {"setting": "", "parameters": "d", **decibels, "work": "d", "cpu_s": ".0f"})
    show("Set12", table, {"image": "d", "side": "d", **dict.fromkeys(images, ".2f")})
    if folder := chosen.assets or (None if quick else ASSETS):
        draw_work(folder / "denoising_work.png", {"total variation": tv_course, "field of experts": course}, rows[1])
        draw_images(folder / "denoising.png", images, [pair.clean for pair in study.test])
    conclude(__file__, chosen, rows, images=table, grid=[grid])


if __name__ == "__main__":
    main()
