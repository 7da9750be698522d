"""No false alarm for correct layers of different make, with one seed of the 20 of a sweep."""

from __future__ import annotations

import pytest

from certify.layers.correct import ADAPTERS, CORRECT
from torchmoe.testing import certify, known_laws

#: The compiler takes longer than all else, and is asked of three in test_certificate.py.
LEFT_OUT = ("higher_orders", "replicas")


@pytest.mark.parametrize("name", CORRECT)
def test_no_false_alarm(name: str) -> None:
    laws = [law.name for law in known_laws() if law.name not in LEFT_OUT]
    certificate = certify(CORRECT[name](0), adapter=ADAPTERS.get(name), laws=laws)
    assert certificate, str(certificate)
