"""How much quicker are survival probabilities and kept counts without a Python loop over tokens?

The twin writes one slice a candidate for every block, as the formula reads: each candidate adds its probability to all
positions that it reaches. Ours is one cumulative sum and one lookup for all blocks. Forward and backward of all blocks
of a 12-block network with 196 patches, as in one training step.
"""

from collections.abc import Sequence

import torch
from common import alternate, conclude, device, parse, rounded, show
from torch import Tensor

from lightning_hpo.functional.compression.diffrate import candidate_counts, kept_plan

BLOCKS, KINDS = 11, 2  # the first of twelve blocks never compresses; it prunes and merges


def loop_plan(probabilities: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """Kept counts and survival probabilities, one proxy and one candidate at a time."""
    candidates = candidate_counts(patches, device=probabilities.device)
    kept, survival = [], []
    for proxy in probabilities.flatten(0, 1):
        expected = (proxy * candidates).sum()
        kept.append(expected + (expected.ceil() - expected).detach())
        reached = proxy.new_zeros(patches + 1)
        for candidate, probability in zip(range(patches, 0, -1), proxy.unbind(), strict=True):
            reached[: candidate + 1] = reached[: candidate + 1] + probability
        survival.append(reached)
    return torch.stack(kept).view(KINDS, -1), torch.stack(survival).view(KINDS, -1, patches + 1)


def run(patches: int, rounds: int) -> list[dict[str, object]]:
    logits = torch.randn(KINDS, BLOCKS, patches, device=device(), requires_grad=True)
    upstream = torch.rand(KINDS, BLOCKS, patches + 1, device=device())

    def step(plan: tuple[Tensor, Tensor]) -> Tensor:
        logits.grad = None
        ((plan[1] * upstream).sum() + plan[0].sum()).backward()
        return logits.grad if logits.grad is not None else logits

    def ours() -> Tensor:
        plan = kept_plan(logits.softmax(-1), patches)
        return step((plan.kept, plan.survival))

    def twin() -> Tensor:
        return step(loop_plan(logits.softmax(-1), patches))

    def ours_forward() -> Tensor:
        with torch.no_grad():
            return kept_plan(logits.softmax(-1), patches).survival

    def twin_forward() -> Tensor:
        with torch.no_grad():
            return loop_plan(logits.softmax(-1), patches)[1]

    torch.testing.assert_close(ours_forward(), twin_forward(), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(), twin(), rtol=1e-3, atol=1e-4)
    rows: list[dict[str, object]] = []
    for what, functions in (
        ("forward", {"ours": ours_forward, "loop twin": twin_forward}),
        ("forward and backward", {"ours": ours, "loop twin": twin}),
    ):
        times = alternate(functions, rounds, calls=10)
        for name, timing in times.items():
            rows.append({"patches": patches, "what": what, "form": name, **rounded(timing)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = parse(__doc__, arguments)
    torch.manual_seed(0)
    sizes, rounds = ((16,), 2) if chosen.quick else ((49, 196, 256), 5)
    rows = [row for patches in sizes for row in run(patches, rounds)]
    columns = {"patches": "d", "what": "", "form": "", "median": ".3g", "fastest": ".3g", "slowest": ".3g"}
    show("22 proxies: seconds, and ratio to ours", rows, {**columns, "ratio": ".0f"})
    conclude(__file__, chosen, rows)


if __name__ == "__main__":
    main()
