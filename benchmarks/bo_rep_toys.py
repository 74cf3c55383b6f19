"""BO-REP on problems with a known answer: the law of the step size, and curvature that grows with the gradient."""

import math
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np
import torch

from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel

__all__ = ["cosh", "law"]

NOTHING: Iterator[Any] = repeat(None)  # full gradients


def law(steps: int) -> Iterator[dict[str, Any]]:
    """Mean gap over the last 200 steps on a quadratic, for halved steps and several schedules of inner steps."""
    generator = np.random.default_rng(0)
    root = generator.normal(size=(4, 4)) / 2
    a = root @ root.T + 0.5 * np.eye(4)
    a /= np.linalg.eigvalsh(a)[-1] / 2
    b, c, t = (torch.tensor(generator.normal(size=s)) for s in ((4, 3), (4,), (4,)))
    inverse, curvature = torch.tensor(np.linalg.inv(a)), torch.tensor(a)
    x0, y0 = (torch.tensor(generator.normal(size=n)) for n in (3, 4))
    slope = inverse @ b
    best = torch.linalg.solve(slope.T @ slope + 0.1 * torch.eye(3).double(), slope.T @ (t - inverse @ c))

    def phi(x: torch.Tensor) -> float:
        return ((inverse @ (b @ x + c) - t).square().sum() / 2 + 0.05 * x.square().sum()).item()

    for interval, inner_steps in ((2, 3), (1, 1), (5, 5), (10, 10)):
        before = math.nan
        for lr in (0.02, 0.01, 0.005, 0.0025) if interval == 2 else (0.02, 0.01):
            method = SingleLoopBilevel(
                lambda y, x, _: y["y"] @ curvature @ y["y"] / 2 - y["y"] @ (b @ x["x"] + c),
                lambda y, x, _: (y["y"] - t).square().sum() / 2 + 0.05 * x["x"].square().sum(),
                lr=lr,
                inner_lr=0.3,
                z_lr=0.3,
                interval=interval,
                inner_steps=inner_steps,
            )
            state, gaps = method.start({"y": y0}, {"x": x0}), []
            for step in range(steps):
                state, _ = method.step(state, NOTHING, NOTHING)
                if step >= steps - 200:
                    gaps.append(phi(state.outer["x"]) - phi(best))
            gap = sum(gaps) / len(gaps)
            ratio = None if math.isnan(before) else round(before / gap, 2)
            yield {"I": interval, "N": inner_steps, "lr": lr, "gap": float(f"{gap:.4g}"), "ratio": ratio}
            before = gap


def cosh(steps: int) -> Iterator[dict[str, Any]]:
    """The hyperbolic cosine of 5(y - 1) as outer loss, from x = -2; one has to get to 1."""
    runs: list[tuple[str, float, dict[str, Any]]] = [("BO-REP", lr, {}) for lr in (0.01, 0.005)]
    runs += [("not normalised", lr, {"normalize": False}) for lr in (1e-3, 1e-6, 1e-7)]
    for name, lr, settings in runs:
        method = SingleLoopBilevel(
            lambda y, x, _: (y["y"] - x["x"]).square() / 2,
            lambda y, _x, _: (5 * (y["y"] - 1)).cosh() / 5,
            lr=lr,
            inner_lr=0.5,
            z_lr=0.3,
            **settings,
        )
        start = torch.tensor(-2.0, dtype=torch.float64)
        state, path = method.start({"y": start}, {"x": start.clone()}), []
        for _ in range(steps):
            state, _ = method.step(state, NOTHING, NOTHING)
            path.append(state.outer["x"].item())
            if abs(path[-1]) > 1e6:
                break
        arrived = next((k for k, x in enumerate(path, 1) if abs(x - 1) < 0.03), None)
        late = path[arrived + 100 :] if arrived else []
        yield {
            "method": name,
            "lr": lr,
            "arrives": arrived,
            "stays_within": round(max(abs(x - 1) for x in late), 4) if late else None,
            "beyond_1e6_in_step": len(path) if abs(path[-1]) > 1e6 else None,
            "x_at_the_end": float(f"{path[-1]:.3g}"),
        }
