"""What tells that the running solution of a linear system goes astray."""

from math import isfinite
from typing import NamedTuple

__all__ = ["Watch"]

_WINDOW = 100  # iterations in which z may not grow ...
_FACTOR = 10  # ... by this factor
_USELESS = 10  # hypergradients in a row that are not finite, after which it is an error


class Watch(NamedTuple):
    r"""Counts hypergradients that are not finite, and remembers how long :math:`z` was.

    Attributes:
        steps: Iterations so far.
        useless: Hypergradients in a row that were not finite.
        mark: The length that z is compared with: the largest of the window before.
        high: The largest length of this window.

    Example:
        >>> watch, usable, grown = Watch().after(gradient=1.0, z=0.1, slope=1.0, z_lr=0.1)
        >>> watch, usable, grown
        (Watch(steps=1, useless=0, mark=10.0, high=0.1), True, False)
        >>> watch.after(gradient=float("nan"), z=0.1, slope=1.0, z_lr=0.1)
        (Watch(steps=2, useless=1, mark=10.0, high=0.1), False, False)
    """

    steps: int = 0
    useless: int = 0
    mark: float = 0.0
    high: float = 0.0

    def after(self, gradient: float, z: float, slope: float, z_lr: float) -> tuple["Watch", bool, bool]:
        r"""Looks at one iteration.

        :math:`z` begins at 0, so its first window is compared with what it could reach without any curvature:
        :math:`100\, \nu \|\nabla_y F\|`.

        Args:
            gradient: Length of the hypergradient.
            z: Length of the new z.
            slope: Length of the outer gradient in the inner parameters.
            z_lr: Step size of z.

        Returns:
            What to remember, whether the hypergradient can be used, and whether z has grown tenfold.

        Raises:
            FloatingPointError: If this was the tenth in a row that cannot be used.
        """
        usable = isfinite(gradient) and isfinite(z)
        useless = 0 if usable else self.useless + 1
        if useless >= _USELESS:
            raise FloatingPointError(
                f"{_USELESS} hypergradients in a row were not finite: either a loss has diverged (lower the inner "
                f"learning rate), or z has: z_lr={z_lr:g} must stay below 2 / lambda_max of the inner Hessian"
            )
        if not usable:
            return self._replace(steps=self.steps + 1, useless=useless), False, False
        mark, high = self.mark, max(self.high, z)
        if mark == 0:
            mark = _WINDOW * z_lr * slope
        grown = 0 < _FACTOR * mark < z
        if grown or (self.steps and self.steps % _WINDOW == 0):
            mark, high = high, 0.0
        return Watch(self.steps + 1, 0, mark, high), True, grown

    def plain(self) -> tuple[int, int, float, float]:
        """The same as an ordinary tuple, for checkpoints; ``Watch(*plain)`` is the way back."""
        return (self.steps, self.useless, self.mark, self.high)

    def words(self, z_lr: float, curvature: float) -> str:
        """A warning that z has grown.

        Args:
            z_lr: Step size of z.
            curvature: The largest curvature that was found.

        Returns:
            A sentence.
        """
        found = f"z has grown {_FACTOR}-fold within {_WINDOW} steps"
        if not z_lr * curvature < 2:
            return (
                f"{found}: z_lr (nu) is {z_lr:g}, but must stay below 2 / lambda_max = {2 / curvature:.3g}: the inner "
                f"Hessian's lambda_max is about {curvature:.3g}"
            )
        return (
            f"{found}, though z_lr (nu), {z_lr:g}, suits the inner Hessian, whose lambda_max is about {curvature:.3g}: "
            "the outer loss is getting steeper, or the inner loss has directions of negative or no curvature (a "
            "penalty on the inner parameters helps)"
        )
