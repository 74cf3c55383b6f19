"""Encodings of conditions whose length does not depend on the condition (MIP), and a test of what that is for."""

from collections.abc import Callable
from math import pi
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ConditionEncoding", "encode_condition", "proportionality"]

ConditionEncoding = Literal["cos_sin", "complement", "none"]


def encode_condition(gamma: Tensor, encoding: ConditionEncoding = "cos_sin") -> Tensor:
    r"""What a hyper-network sees of conditions :math:`\gamma \in [0, 1]^k`.

    ``"cos_sin"`` is :math:`[\cos(\pi\gamma/2), \sin(\pi\gamma/2)]`, of Euclidean length :math:`\sqrt k`;
    ``"complement"`` is :math:`[\gamma, 1 - \gamma]`, whose entries sum to k; ``"none"`` is :math:`\gamma`.

    Args:
        gamma: ``(..., k)``.
        encoding: Which.

    Returns:
        ``(..., 2 k)``, or ``(..., k)`` for ``"none"``.

    Raises:
        ValueError: If there is no such encoding.

    References:
        Gonzalez Ortiz, Guttag and Dalca, "Magnitude Invariant Parametrizations Improve Hypernetwork Learning", ICLR
        2024, section 4.

    Example:
        >>> encode_condition(torch.tensor([0.0, 0.5]))  # all cosines, then all sines
        tensor([1.0000, 0.7071, 0.0000, 0.7071])
    """
    if encoding == "none":
        return gamma
    if encoding == "complement":
        return torch.cat([gamma, 1 - gamma], -1)
    if encoding != "cos_sin":
        raise ValueError(f"encoding must be 'cos_sin', 'complement' or 'none', got {encoding!r}")
    angle = gamma * (pi / 2)
    return torch.cat([angle.cos(), angle.sin()], -1)


def proportionality(function: Callable[[Tensor], Tensor], gammas: Tensor) -> float:
    r"""The slope of :math:`\log \lVert h(\gamma) \rVert` in :math:`\log \lVert \gamma \rVert`.

    One for a network whose output is proportional to its input, which is what makes training hyper-networks hard: the
    scale of every predicted weight then depends on the condition. Near zero with MIP.

    Args:
        function: From a condition ``(k)`` to a tensor of any shape.
        gammas: Conditions ``(n, k)`` of different lengths.

    Returns:
        The least-squares slope.

    Raises:
        ValueError: If there are fewer than two lengths above zero.

    Example:
        >>> proportionality(lambda gamma: 3 * gamma, torch.tensor([[0.1], [0.5], [1.0]]))
        1.0
    """
    with torch.no_grad():
        x = gammas.double().norm(dim=-1)
        y = torch.stack([function(gamma).double().norm() for gamma in gammas])
    used = (x > 0) & (y > 0)
    if len(x[used].unique()) < 2:
        raise ValueError("conditions of at least two lengths above zero are needed")
    x, y = x[used].log(), y[used].log()
    x = x - x.mean()
    return round(((x * (y - y.mean())).sum() / x.square().sum()).item(), 6)
