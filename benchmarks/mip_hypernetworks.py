"""Do magnitude invariant hyper-networks train where ordinary ones do not, and what does a step of them cost?

Digits whose noise is the condition, in four parametrisations, as in `docs/methods/mip_hypernetworks.md`: accuracy and
loss over the course of training, the norm of gradients by condition, the size of predicted weights at the beginning.
Then the cost of a step beside a plain one, and a weight decay chosen after training.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conclude, parse, show
from matplotlib.figure import Figure
from mip_cost import cost_rows
from mip_decay import decay_rows
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hpo import ConditionSpec, hypernetize
from lightning_hpo.functional.bilevel.condition_draws import sample_conditions
from lightning_hpo.nn.hyper_network import HyperNetwork
from lightning_hpo.nn.mip_hypernetworks import Hypernetized

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
WAYS: dict[str, dict[str, Any]] = {
    "default": {"encoding": "none", "residual": False},
    "encoding only": {"residual": False},
    "residual only": {"encoding": "none"},
    "MIP": {},
}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
}
GRID = torch.tensor([[0.0], [0.25], [0.5], [0.75], [1.0]])
BINS = 10


def primary(average: bool = True) -> nn.Module:
    """Two convolutions and a linear layer, on the mean over all places or on each of four; begun as in the paper."""
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    last: list[nn.Module] = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)]
    if average:
        last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*first, *last).apply(begin)


def begin(layer: nn.Module) -> None:
    """Kaiming's initialisation for a leaky ReLU; torch's own is less than half as large."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(layer.weight, a=0.01)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,400 images for training and 397 for the test, the same whatever the seed of a run."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(images))
    x = torch.tensor(images[order] / 16, dtype=torch.float32).unflatten(1, (1, 8, 8))
    y = torch.tensor(labels[order])
    return x[:1400], y[:1400], x[1400:], y[1400:]


def run(way: str, optimizer_name: str, seed: int, epochs: int, average: bool = True) -> dict[str, Any]:
    """One run: accuracy and loss on the test images after every epoch, and the gradient's norm at every step."""
    x, y, x_test, y_test = digits()
    torch.manual_seed(seed)
    net = hypernetize(primary(average), ConditionSpec().add("noise", 0.0, 0.7), **WAYS[way])
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    noise = torch.randn(x_test.shape, generator=torch.Generator().manual_seed(0))
    accuracy: list[float] = []
    loss: list[float] = []
    norms: list[float] = []
    drawn: list[float] = []
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            net.gamma = sample_conditions(range(len(drawn), len(drawn) + 1), 1, seed, stratified=False)[0]
            optimizer.zero_grad()
            norms.append(backward(net, x[rows], y[rows]))
            drawn.append(net.gamma.item())
            optimizer.step()
        with torch.no_grad():
            logits = torch.stack([net(x_test + 0.7 * gamma * noise, gamma=gamma) for gamma in GRID])
        accuracy.append((logits.argmax(-1) == y_test).float().mean().item())
        loss.append(torch.stack([F.cross_entropy(at, y_test) for at in logits]).mean().item())
    return {"accuracy": accuracy, "loss": loss, "norms": norms, "gammas": drawn}


def first_epoch(losses: Sequence[float], below: float) -> int | None:
    """The first epoch, from 1, after which the loss is below a value."""
    return next((epoch for epoch, loss in enumerate(losses, 1) if loss <= below), None)


def row_of(way: str, optimizer: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a run."""
    accuracy, loss = found["accuracy"], found["loss"]
    at = {f"epoch_{epoch}": round(accuracy[min(epoch, len(accuracy)) - 1], 3) for epoch in (3, 10, 30)}
    return {
        "parametrisation": way,
        "optimizer": optimizer,
        "seed": seed,
        **at,
        "test_loss": round(loss[-1], 3),
        "epochs_to_1.5": first_epoch(loss, 1.5),
        "epochs_to_1.0": first_epoch(loss, 1.0),
        "epochs_to_0.7": first_epoch(loss, 0.7),
    }


def first_gradients(way: str, seed: int, gammas: Sequence[float], batches: int = 20) -> list[float]:
    """Mean norm of the gradient of predicted kernels at the beginning, for some conditions."""
    x, y, _, _ = digits()
    torch.manual_seed(seed)
    net = hypernetize(primary(), ConditionSpec().add("noise", 0.0, 0.7), **WAYS[way])
    found = []
    for gamma in gammas:
        norms = []
        for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(32)[:batches]:
            net.gamma = torch.tensor([gamma])
            norms.append(backward(net, x[rows], y[rows]))
        found.append(float(np.mean(norms)))
    return found


def backward(net: Hypernetized, x: Tensor, y: Tensor) -> float:
    """One backward pass for the present condition; returns the norm of the gradient of predicted kernels."""
    weights = net.hyper_network(net.gamma)
    kernels = [value for value in weights.values() if value.ndim > 1]
    for kernel in kernels:
        kernel.retain_grad()
    inputs = x + net.condition["noise"] * torch.randn(x.shape)
    F.cross_entropy(torch.func.functional_call(net.module, weights, inputs), y).backward()
    return nn.utils.get_total_norm([kernel.grad for kernel in kernels if kernel.grad is not None]).item()


def gradient_rows(seeds: int, quick: bool) -> list[dict[str, Any]]:
    """The gradient's norm at the beginning by condition, and its slope on logarithms."""
    gammas, rows = (0.01, 0.1, 0.5, 1.0), []
    for way in WAYS:
        found = np.mean([first_gradients(way, s, gammas, 1 if quick else 20) for s in range(seeds)], 0)
        slope = np.polyfit(np.log(gammas), np.log(found), 1)[0]
        at = {f"gamma_{g:g}": float(f"{n:.3g}") for g, n in zip(gammas, found, strict=True)}
        rows.append({"parametrisation": way, **at, "slope": round(float(slope), 2)})
    return rows


def by_bin(course: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Median, tenth and ninetieth percentile of the gradient's norm for each tenth of the condition."""
    norms, bins = np.array(course["norms"]), np.minimum((np.array(course["gammas"]) * BINS).astype(int), BINS - 1)
    quantiles = [
        np.quantile(norms[bins == b], (0.5, 0.1, 0.9)) if (bins == b).any() else [np.nan] * 3 for b in range(BINS)
    ]
    middle, low, high = np.array(quantiles).T
    return middle, low, high


def kernel_size(way: str, kaiming: bool, seed: int, gamma: float) -> float:
    """Standard deviation of a predicted kernel of 16x8x3x3 at the beginning."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(8, 16, 3)
    if kaiming:
        begin(layer)
    network = HyperNetwork({"w": layer.weight}, conditions=1, **WAYS[way])
    with torch.no_grad():
        return network(torch.tensor([gamma]))["w"].std().item()


def size_rows(seeds: int) -> list[dict[str, Any]]:
    """Its size by condition, and how far those at 0.01 and at 1 are from each other over some seeds."""
    rows = []
    for way, kaiming in (("default", False), ("MIP", False), ("MIP", True)):
        stds = {f"gamma_{g:g}": float(f"{kernel_size(way, kaiming, 0, g):.4g}") for g in (0.01, 0.1, 0.5, 1.0)}
        pairs = [[kernel_size(way, kaiming, seed, gamma) for gamma in (0.01, 1.0)] for seed in range(seeds)]
        ratios = [max(pair) / min(pair) for pair in pairs]
        name = f"{way}, Kaiming's initialisation" if kaiming else way
        spread = {"median_ratio": round(float(np.median(ratios)), 3), "largest_ratio": round(max(ratios), 3)}
        rows.append({"parametrisation": name, **stds, **spread})
    return rows


def draw(courses: dict[tuple[str, str, int], dict[str, Any]], path: Path) -> None:
    """Gradient norms, MIP beside the ordinary hyper-network: at the beginning, over steps, and by condition."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    gammas = np.geomspace(0.01, 1, 9).tolist()
    for way, colour in (("default", "C3"), ("MIP", "C0")):
        axes[0][0].plot(gammas, first_gradients(way, 0, gammas), "o-", ms=3, color=colour, label=way)
        stds = [kernel_size(way, True, 0, gamma) for gamma in gammas]
        axes[1][0].plot(gammas, stds, "o-", ms=3, color=colour, label=way)
        for row, optimizer in enumerate(OPTIMIZERS):
            course = courses[way, optimizer, 0]
            axes[row][1].plot(course["norms"], ".", ms=1.5, alpha=0.4, color=colour, label=way)
            middle, low, high = by_bin(course)
            centres = (np.arange(BINS) + 0.5) / BINS
            axes[row][2].fill_between(centres, low, high, color=colour, alpha=0.2, lw=0)
            axes[row][2].plot(centres, middle, "o-", ms=3, color=colour, label=way)
    for row, optimizer in enumerate(OPTIMIZERS):
        axes[row][0].set(title="at the beginning", xlabel="condition", xscale="log")
        axes[row][1].set(title=f"{optimizer}, all steps", xlabel="step", ylabel="norm of the gradient")
        title = f"{optimizer}, median and 80 % of the steps"
        axes[row][2].set(title=title, xlabel="condition", ylabel="norm of the gradient")
    axes[0][0].set_ylabel("norm of the gradient")
    axes[1][0].set_ylabel("std of a predicted kernel")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.legend(markerscale=2)
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything."""
    chosen = parse(__doc__, arguments)
    warnings.filterwarnings("ignore", message=".*proportional to the condition.*")
    seeds, epochs = (1, 1) if chosen.quick else (2, 30)
    courses = {
        (way, optimizer, seed): run(way, optimizer, seed, epochs)
        for optimizer in OPTIMIZERS
        for way in WAYS
        for seed in range(seeds)
    }
    rows = [row_of(*key, course) for key, course in courses.items()]
    columns = dict.fromkeys(("epoch_3", "epoch_10", "epoch_30", "test_loss"), ".3f")
    columns |= dict.fromkeys(("epochs_to_1.5", "epochs_to_1.0", "epochs_to_0.7"), "d")
    show("Digits", rows, {"parametrisation": "", "optimizer": "", "seed": "d", **columns})
    others = {(w, o, 0): run(w, o, 0, epochs, average=False) for o in OPTIMIZERS for w in ("default", "MIP")}
    other = [row_of(*key, course) for key, course in others.items()]
    show("Digits, a wider linear layer", other, {"parametrisation": "", "optimizer": "", "seed": "d", **columns})
    norms, sizes = gradient_rows(seeds, chosen.quick), size_rows(2 if chosen.quick else 200)
    show(
        "Norm of the gradient at the beginning",
        norms,
        {key: "" if isinstance(norms[0][key], str) else ".3g" for key in norms[0]},
    )
    show("Size of a predicted kernel", sizes, {key: "" if key == "parametrisation" else ".4g" for key in sizes[0]})
    cost = cost_rows(chosen.quick)
    show("Cost", cost, {"what": "", "ms": ".2f", "ratio": ".2f", "parameters": ",d"})
    decay = decay_rows(chosen.quick)
    show("Weight decay", decay, {"what": "", "weight_decay": ".2g", "val_loss": ".4f", "cpu_s": ".1f"})
    if not chosen.quick:
        draw(courses, ASSETS / "mip_hypernetworks_gradients.png")
    conclude(__file__, chosen, rows, other=other, norms=norms, sizes=sizes, cost=cost, decay=decay)


if __name__ == "__main__":
    main()
