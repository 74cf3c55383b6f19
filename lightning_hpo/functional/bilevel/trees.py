"""Nested structures of tensors as one vector."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Arguments", "Tree", "TreeLayout", "leaves", "ravel", "tree_map", "vdot"]

Tree = Any  # a tensor, or dicts, lists, tuples and named tuples of trees


def leaves(tree: Tree, name: str = "tree") -> list[Tensor]:
    """Tensors of a structure, in the order of :func:`ravel`.

    Args:
        tree: A tensor, or nested dicts, lists and tuples of tensors.
        name: What to call it in an error.

    Returns:
        Its tensors.

    Raises:
        TypeError: If a leaf is not a tensor.

    Example:
        >>> leaves({"w": torch.zeros(2), "b": [torch.ones(1)]})
        [tensor([0., 0.]), tensor([1.])]
    """
    found = pytree.tree_leaves(tree)
    wrong = sorted({type(leaf).__name__ for leaf in found if not isinstance(leaf, Tensor)})
    if wrong:
        raise TypeError(f"{name} must hold tensors only, got {', '.join(wrong)}")
    return found


class TreeLayout:
    """Shapes and order of a structure of tensors, to go from it to one vector and back.

    Args:
        tree: An example of the structure.

    Raises:
        TypeError: If a leaf is not a tensor.
        ValueError: If there is no tensor.

    Example:
        >>> layout = TreeLayout({"w": torch.zeros(2, 2), "b": torch.zeros(1)})
        >>> layout.size, layout.unravel(torch.arange(5.0))
        (5, {'w': tensor([[0., 1.], [2., 3.]]), 'b': tensor([4.])})
    """

    def __init__(self, tree: Tree) -> None:
        parts = leaves(tree)
        if not parts:
            raise ValueError("a structure without tensors has no vector")
        self.spec = pytree.tree_structure(tree)
        self.shapes = [part.shape for part in parts]
        self.dtypes = [part.dtype for part in parts]
        self.sizes = [part.numel() for part in parts]
        self.size = sum(self.sizes)

    def parts(self, tree: Tree, name: str = "tree") -> list[Tensor]:
        """Tensors of a structure, checked against this layout; the order of the keys of a dict does not matter.

        Args:
            tree: The structure.
            name: What to call it in an error.

        Returns:
            Its tensors in the order of the layout.

        Raises:
            ValueError: If structure or shapes differ.
        """
        try:
            parts = self.spec.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(f"{name} has another structure than expected: {error}") from error
        if not all(isinstance(part, Tensor) for part in parts):
            wrong = sorted({type(part).__name__ for part in parts if not isinstance(part, Tensor)})
            raise ValueError(f"{name} has another structure than expected: a tensor is wanted, got {', '.join(wrong)}")
        shapes = [tuple(part.shape) for part in parts]
        expected = [tuple(shape) for shape in self.shapes]
        if shapes != expected:
            raise ValueError(f"{name} must have the shapes {expected}, got {shapes}")
        return parts

    def ravel(self, tree: Tree, name: str = "tree", dtype: torch.dtype | None = None) -> Tensor:
        """A structure as one vector.

        Args:
            tree: The structure.
            name: What to call it in an error.
            dtype: Of the vector; promoted from the tensors where None.

        Returns:
            Shape ``(size,)``.
        """
        flat = torch.cat([part.reshape(-1) for part in self.parts(tree, name)])
        return flat if dtype is None else flat.to(dtype)

    def unravel(self, vector: Tensor) -> Tree:
        """A vector as the structure, in the dtypes of the example.

        Args:
            vector: Shape ``(size,)``.

        Returns:
            The structure; views of the vector where no dtype changes.
        """
        pieces = vector.split(self.sizes)
        return self.rebuild(
            [piece.view(shape).to(dtype) for piece, shape, dtype in zip(pieces, self.shapes, self.dtypes, strict=True)]
        )

    def rebuild(self, parts: Sequence[Any]) -> Tree:
        """The structure with other leaves.

        Args:
            parts: Leaves in the order of the layout.

        Returns:
            The structure.
        """
        return pytree.tree_unflatten(list(parts), self.spec)


class Arguments:
    """Several structures theta as one list of tensors.

    Args:
        theta: The structures; None stands for an argument that is not there.

    Raises:
        TypeError: If a leaf is not a floating point tensor; all are listed.

    Example:
        >>> arguments = Arguments([{"a": torch.ones(1)}, None, torch.zeros(2)])
        >>> len(arguments.tensors), arguments.merge([torch.ones(1), torch.ones(2)])
        (2, ({'a': tensor([1.])}, None, tensor([1., 1.])))
    """

    def __init__(self, theta: Sequence[Tree]) -> None:
        wrong = []
        self.layouts: list[TreeLayout | None] = []
        self.tensors: list[Tensor] = []
        for index, argument in enumerate(theta):
            if argument is None:
                self.layouts.append(None)
                continue
            parts = leaves(argument, f"theta argument {index}")
            wrong += [f"{index}: {part.dtype}" for part in parts if not part.is_floating_point()]
            self.layouts.append(TreeLayout(argument))
            self.tensors += parts
        if wrong:
            raise TypeError(
                f"theta must be floating point, got argument {', '.join(wrong)}; what is not differentiated, as data "
                "with integer labels, belongs into the function itself (a closure or functools.partial)"
            )

    def merge(self, tensors: Sequence[Any]) -> tuple[Tree, ...]:
        """The structures again, of other tensors in the same order.

        Args:
            tensors: As many as there are in the structures.

        Returns:
            One structure an argument.
        """
        rest, merged = list(tensors), []
        for layout in self.layouts:
            count = len(layout.shapes) if layout else 0
            merged.append(layout.rebuild(rest[:count]) if layout else None)
            rest = rest[count:]
        return tuple(merged)

    def split(self, tangents: Sequence[Tree | None]) -> list[Tensor | None]:
        """One tangent a tensor.

        Args:
            tangents: For each argument a structure like it, or None.

        Returns:
            For each tensor its tangent, or None.

        Raises:
            ValueError: If number, structure or shapes differ.
        """
        if len(tangents) != len(self.layouts):
            raise ValueError(f"expected one tangent for each of {len(self.layouts)} arguments, got {len(tangents)}")
        found: list[Tensor | None] = []
        for index, (layout, tangent) in enumerate(zip(self.layouts, tangents, strict=True)):
            if layout is None:
                continue
            nothing: list[Tensor | None] = [None] * len(layout.shapes)
            found += nothing if tangent is None else layout.parts(tangent, f"the tangent of argument {index}")
        return found


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """A structure as one vector, and the way back.

    Args:
        tree: A tensor, or nested dicts, lists and tuples of tensors.

    Returns:
        The vector, and a function from a vector of that size to the structure.

    Example:
        >>> vector, back = ravel([torch.tensor([1.0, 2.0]), torch.tensor(3.0)])
        >>> vector, back(2 * vector)
        (tensor([1., 2., 3.]), [tensor([2., 4.]), tensor(6.)])
    """
    layout = TreeLayout(tree)
    return layout.ravel(tree), layout.unravel


def tree_map(function: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Applies a function to corresponding tensors of one or more structures.

    Args:
        function: From as many tensors as there are structures to a tensor.
        tree: The first structure.
        others: More of the same structure.

    Returns:
        The structure of the results.

    Example:
        >>> tree_map(torch.add, [torch.ones(2)], [torch.ones(2)])
        [tensor([2., 2.])]
    """
    return pytree.tree_map(function, tree, *others)


def vdot(left: Tree, right: Tree) -> Tensor:
    r"""Inner product :math:`\sum_i \langle l_i, r_i \rangle` of two structures.

    Args:
        left: A structure.
        right: Another of the same structure.

    Returns:
        A scalar.

    Example:
        >>> vdot([torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([1.0, 1.0]), torch.tensor(2.0)])
        tensor(9.)
    """
    layout = TreeLayout(left)
    return layout.ravel(left) @ layout.ravel(right)
