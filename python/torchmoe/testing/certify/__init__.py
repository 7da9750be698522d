"""Whether the laws of mixture-of-experts layers hold for a given layer.

A law is data (`law.py`) in a file of its own (`laws/`). `entry.py` tests the laws on a `Subject`,
which is the layer copied and read through a `torchmoe.Adapter`. The result is a `Certificate`.
"""

from torchmoe.testing.certify.certificate import Certificate, Finding, NotAsked
from torchmoe.testing.certify.entry import certify
from torchmoe.testing.certify.law import Law
from torchmoe.testing.certify.laws import known_laws

__all__ = ["Certificate", "Finding", "Law", "NotAsked", "certify", "known_laws"]
