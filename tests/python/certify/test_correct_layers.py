"""No false alarm for correct layers of different make, with one seed of the 20 of a sweep."""

from __future__ import annotations

import pytest

from certify.layers.correct import ADAPTERS, CORRECT
from torchmoe.testing import certify, known_laws

#: One of each make. The compiler takes longer than all else and is asked of three in
#: test_certificate.py.
NAMES = [
    "own_capacity",
    "own_deepseek",
    "own_expert_choice",
    "own_straight_through",
    "relu",
    "hard",
    "gpt_oss",
    "deepseek",
    "noisy",
    "injected",
    "dispatch_probs",
    "grouped",
    "bias",
]
LEFT_OUT = ("higher_orders", "replicas")


@pytest.mark.parametrize("name", NAMES)
def test_no_false_alarm(name: str) -> None:
    laws = [law.name for law in known_laws() if law.name not in LEFT_OUT]
    certificate = certify(CORRECT[name](0), adapter=ADAPTERS.get(name), laws=laws)
    assert certificate, str(certificate)
