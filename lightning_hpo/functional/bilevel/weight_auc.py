"""How well weights of examples tell right labels from wrong ones."""

import torch
from torch import Tensor

__all__ = ["weight_auc"]


def weight_auc(weights: Tensor, corrupted: Tensor) -> Tensor:
    r"""Area under the ROC curve: how often an example with a right label weighs more than one with a wrong label.

    .. math::

        \frac{1}{|C|\,|W|} \sum_{i \in C} \sum_{j \in W} [w_i > w_j] + \tfrac12 [w_i = w_j]

    with the right examples C and the wrong ones W; by sorting, without forming the pairs.

    Args:
        weights: Shape ``(n,)``.
        corrupted: True where the label is wrong, shape ``(n,)``.

    Returns:
        A scalar between 0 and 1; 0.5 where weights say nothing.

    Raises:
        ValueError: If shapes or dtype do not fit, or all examples are of one kind.

    Example:
        >>> weight_auc(torch.tensor([0.9, 0.2, 0.8, 0.8]), torch.tensor([False, True, False, True]))
        tensor(0.8750)
    """
    if corrupted.dtype != torch.bool or weights.ndim != 1 or weights.shape != corrupted.shape:
        raise ValueError(
            f"weights and a boolean mask of one shape (n,) are needed, got {tuple(weights.shape)} and "
            f"{tuple(corrupted.shape)} of {corrupted.dtype}"
        )
    wrong = weights[corrupted].sort().values
    right = weights[~corrupted]
    if not (len(wrong) and len(right)):
        raise ValueError("all examples are of one kind: there must be right labels and wrong ones")
    below = torch.searchsorted(wrong, right) + torch.searchsorted(wrong, right, right=True)
    return below.to(torch.get_default_dtype()).mean() / (2 * len(wrong))
