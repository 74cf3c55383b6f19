"""Structures of tensors to vectors and back."""

from collections import OrderedDict

import pytest
import torch

from lightning_hpo.functional.bilevel.trees import TreeLayout, leaves, ravel, tree_map, vdot


def test_there_and_back() -> None:
    tree = {"w": torch.randn(2, 3), "more": [torch.randn(()), (torch.randn(0), torch.randn(4))]}
    vector, back = ravel(tree)
    assert vector.shape == (11,)
    again = back(vector)
    assert again["more"][0].shape == ()
    torch.testing.assert_close(again, tree, rtol=0, atol=0)


def test_the_order_of_keys_does_not_matter() -> None:
    layout = TreeLayout({"a": torch.zeros(1), "b": torch.zeros(2)})
    swapped = {"b": torch.tensor([2.0, 3.0]), "a": torch.tensor([1.0])}
    assert layout.ravel(swapped).tolist() == [1, 2, 3]


def test_dtypes_come_back() -> None:
    vector, back = ravel([torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.bfloat16)])
    assert vector.dtype == torch.float64
    assert [part.dtype for part in back(vector)] == [torch.float64, torch.bfloat16]


def test_inner_product_is_that_of_the_vectors() -> None:
    left, right = ([torch.randn(3), torch.randn(2, 2)] for _ in range(2))
    expected = sum((a * b).sum() for a, b in zip(left, right, strict=True))
    torch.testing.assert_close(vdot(left, right), expected)
    torch.testing.assert_close(tree_map(torch.sub, left, left)[1], torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"a": torch.zeros(2)}, "structure"),
        ([torch.zeros(3)], "shapes"),
        (OrderedDict(b=torch.zeros(2)), "structure"),
    ],
)
def test_another_structure_is_refused(tree: object, match: str) -> None:
    with pytest.raises(ValueError, match=f"the answer .*{match}"):
        TreeLayout([torch.zeros(2)]).ravel(tree, "the answer")


def test_leaves_that_are_no_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="x must hold tensors only, got float, str"):
        leaves([1.0, "a", torch.zeros(1)], "x")
    with pytest.raises(ValueError, match="without tensors"):
        TreeLayout([])
