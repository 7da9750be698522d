"""How what a document shows is compared with what its code prints."""

from __future__ import annotations

import pytest

from documents import differences


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        ("loss 1.000", "loss 1.019", True),
        ("loss 1.000", "loss 1.021", False),
        ("loss  1.000", "loss 1.000", True),
        ("loss 1.000", "lost 1.000", False),
        ("loss 1.000", "loss 1.000 more", False),
        ("loss 1.000\n", "loss 1.000\nloss 1.000\n", False),
        ("0.000", "0.001", True),
        ("0.000", "0.002", False),
        ("6.51e-03", "6.60e-03", True),
        ("6.51e-03", "6.51e-04", False),
        ("-8.2e-07", "8.2e-07", False),
        ("1e-05", "3e-05", False),
        ("-0.005", "0.005", False),
        ("100 tokens", "101 tokens", False),
        ("4,844,421,120", "4,844,421,121", False),
        ("1 token", "1.0 token", False),
        ("float32 3", "float64 3", False),
        ("[31, 33]", "[31, 32]", False),
        ("0.50", "nan", False),
        ("12.1%", "12.0%", True),
        ("broken (2.4 s)", "broken (31.2 s)", True),
        ("broken (2.4 s)", "broken (2.4 m)", False),
        ("", "1", False),
    ],
)
def test_comparison(expected: str, actual: str, same: bool) -> None:
    assert (not differences(expected, actual, 0.02)) == same


def test_the_last_digit_may_be_off_by_more() -> None:
    assert not differences("loss 0.50", "loss 0.52", 0.01, last_digits=2)
    assert differences("loss 0.50", "loss 0.53", 0.01, last_digits=2)
