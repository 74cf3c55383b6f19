"""Which ways there are to measure a gradient's noise, and which of them suit a module."""

from typing import Literal, cast

from torch import Tensor, nn

from lightning_hpo.nn.per_sample import compiled_modules
from lightning_hpo.stateless import PerSampleGradients, batch_mixing_layers

__all__ = ["Estimator", "choose_estimators"]

Estimator = Literal["micro_batch", "ghost", "vmap", "difference"]
_ENOUGH = 0.9  # share of the parameters that layer rules must cover for "auto" to take ghost norms


def choose_estimators(
    estimator: str, module: nn.Module, single_samples: bool, groups: int, sharded: bool = False
) -> tuple[list[Estimator], dict[str, Tensor], list[str]]:
    """Which estimators to use for a module, cheapest first, and on which parameters.

    Args:
        estimator: One of :data:`Estimator`, or ``"auto"``.
        module: The user's module.
        single_samples: Whether the policy needs gradients of single samples.
        groups: Groups of samples in the first optimizer steps whose gradients can be told apart: micro-batches, over
            all ranks unless parameters are sharded.
        sharded: Whether each rank holds a part of every parameter.

    Returns:
        The estimators; the parameters they watch by name, without those that layer rules do not cover where layer
        rules are used; the problems, each with what to change.
    """
    trained: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if sharded:
        return ["micro_batch"], trained, _sharded_problems(estimator, single_samples, groups)
    mixing = batch_mixing_layers(module)
    covered = {name: trained[name] for name in PerSampleGradients(module).covered}
    share = sum(p.numel() for p in covered.values()) / max(sum(p.numel() for p in trained.values()), 1)
    compiled = compiled_modules(module)
    ghost = not mixing and not compiled and share >= _ENOUGH
    exact: Estimator = "ghost" if ghost else "vmap"
    chosen: list[Estimator] = [exact] if single_samples else ["micro_batch", "ghost" if ghost else "difference"]
    if estimator != "auto":
        chosen = [cast(Estimator, estimator)]
    problems = []
    if mixing and {"ghost", "vmap"} & set(chosen):
        problems.append(
            f"{', '.join(mixing)} mix the samples of a batch, so that a single sample has no gradient; use "
            "`estimator='micro_batch'`, or another norm."
        )
    if "ghost" in chosen and compiled:
        problems.append(
            f"compiled modules ({', '.join(compiled)}) do not run hooks; use `estimator='micro_batch'` or 'difference'."
        )
    if chosen == ["ghost"] and not covered:
        problems.append("no layer of the module has a rule for ghost norms; use `estimator='vmap'`.")
    if chosen == ["micro_batch"] and groups < 2:
        problems.append(
            "`estimator='micro_batch'` compares micro-batches, and a step has one; set `accumulate_grad_batches` to 2 "
            "or more, use more ranks, or `estimator='difference'`."
        )
    if single_samples and not {"ghost", "vmap"} & set(chosen):
        problems.append(f"the policy needs gradients of single samples; use `estimator='ghost'`, not {estimator!r}.")
    return chosen, covered if "ghost" in chosen else trained, problems


def _sharded_problems(estimator: str, single_samples: bool, groups: int) -> list[str]:
    problems = []
    if estimator not in ("auto", "micro_batch") or single_samples:
        asked = "the policy needs gradients of single samples" if single_samples else f"estimator={estimator!r}"
        problems.append(
            f"{asked}, but a rank that holds a part of each parameter sees averages over ranks alone; use "
            "`estimator='micro_batch'` and a norm test, or `strategy='ddp'`."
        )
    if groups < 2:
        problems.append(
            "where parameters are sharded the micro-batches of a step are compared, and it has one; set "
            "`accumulate_grad_batches` to 2 or more."
        )
    return problems
