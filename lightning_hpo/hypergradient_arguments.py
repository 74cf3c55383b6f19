"""What is wrong with the arguments of a hypergradient, and what its estimator is."""

from collections.abc import Mapping, Sequence

from lightning_hpo.functional.arguments import is_whole
from lightning_hpo.functional.bilevel.estimators import ESTIMATORS
from lightning_hpo.tuned_optimizer import tuning_problems

__all__ = ["argument_problems", "choose_estimator"]


def choose_estimator(estimator: str, tune: Sequence[str]) -> str:
    """The estimator that ``"auto"`` stands for.

    Args:
        estimator: A name in :data:`~lightning_hpo.functional.bilevel.estimators.ESTIMATORS`, or ``"auto"``.
        tune: The settings of the optimizer that are tuned.

    Returns:
        ``"unrolled"`` where a setting is tuned that does not change where training ends, ``"ift_cg"`` otherwise; any
        other name as it is.

    Example:
        >>> choose_estimator("auto", ("lr",)), choose_estimator("auto", ("weight_decay",))
        ('unrolled', 'ift_cg')
    """
    if estimator != "auto":
        return estimator
    return "unrolled" if _of_the_way(tune) else "ift_cg"


def argument_problems(
    tune: Sequence[str],
    bounds: Mapping[str, tuple[float, float]],
    estimator: str,
    product: str,
    sync: str,
    every_n_steps: int,
    warmup_steps: int,
    lr: float,
    max_norm: float | None,
) -> list[str]:
    """What is wrong with arguments of :class:`~lightning_hpo.Hypergradient`, as far as it can be known before a fit.

    Args:
        tune: The settings of the optimizer that are tuned.
        bounds: Lowest and highest value by the name of a setting.
        estimator: Its name, or ``"auto"``.
        product: How second derivatives are taken.
        sync: What is averaged over ranks.
        every_n_steps: Optimizer steps from one update to the next.
        warmup_steps: Optimizer steps before the first update.
        lr: Learning rate of the raw hyperparameters.
        max_norm: Largest norm of a hypergradient.

    Returns:
        One phrase a problem.

    Example:
        >>> argument_problems(["lr"], {}, "auto", "auto", "none", 20, 0, 0.1, None)
        ["sync must be 'exact' or 'local', got 'none'"]
    """
    problems = tuning_problems(tune, bounds)
    checks = {
        f"estimator must be 'auto' or one of {sorted(ESTIMATORS)}, got {estimator!r}": estimator == "auto"
        or estimator in ESTIMATORS,
        f"every_n_steps must be a positive integer, got {every_n_steps!r}": is_whole(every_n_steps, 1),
        f"warmup_steps must be an integer of at least 0, got {warmup_steps!r}": is_whole(warmup_steps, 0),
        f"lr must be positive, got {lr!r}": lr > 0,
        f"max_norm must be positive, got {max_norm!r}": max_norm is None or max_norm > 0,
        f"product must be 'auto', 'exact' or 'fd', got {product!r}": product in ("auto", "exact", "fd"),
        f"sync must be 'exact' or 'local', got {sync!r}": sync in ("exact", "local"),
    }
    problems += [problem for problem, holds in checks.items() if not holds]
    if not problems and _of_the_way(tune) and not ESTIMATORS[choose_estimator(estimator, tune)].follows_steps:
        following = tuple(name for name, entry in ESTIMATORS.items() if entry.follows_steps)
        problems.append(
            f"{estimator!r} looks at where training ends, which {_of_the_way(tune)} do not change; use one of "
            f"{following}"
        )
    return problems


def _of_the_way(tune: Sequence[str]) -> list[str]:
    """Settings that change the way of training and not where it ends."""
    return sorted(set(tune) - {"weight_decay"})
