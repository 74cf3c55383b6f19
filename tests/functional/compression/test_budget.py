"""Budgets as people write them."""

import math

import pytest

from lightning_hpo.functional.compression.budget import parse_budget


@pytest.mark.parametrize(
    ("target", "fraction", "macs"),
    [
        (0.6, 0.6, None),
        ("0.6", 0.6, None),
        (1e-6, 1e-6, None),
        (2.9e9, None, 2.9e9),
        (2_900_000_000, None, 2.9e9),
        ("2.9G", None, 2.9e9),
        ("2.9g", None, 2.9e9),
        (" 2.9 GMACs ", None, 2.9e9),
        ("850M", None, 8.5e8),
        ("1.5T", None, 1.5e12),
        ("12K", None, 1.2e4),
        ("2.9e9", None, 2.9e9),
        ("2900000000", None, 2.9e9),
        (1000, None, 1000.0),
    ],
)
def test_three_forms(target, fraction, macs):
    found = parse_budget(target)
    assert found == (pytest.approx(fraction) if fraction else None, pytest.approx(macs) if macs else None)


@pytest.mark.parametrize(
    "target",
    [2.9, 11.5, 0, 0.0, 1, 1.0, 70, 999, -0.5, -2.9e9, math.nan, math.inf, True, False, None, "", "G", "2.9", "60%",
     "-2.9G", "2.9B", "half", [0.6], "1.0", "0", "nan", "inf"],
)  # fmt: skip
def test_a_number_that_lost_its_unit(target):
    with pytest.raises(ValueError, match="is no budget") as error:
        parse_budget(target)
    for form in ("0.6", "2.9e9", "'2.9G'"):  # the three forms are explained
        assert form in str(error.value)
