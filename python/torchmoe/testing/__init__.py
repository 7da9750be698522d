"""What unit tests of layers, routers and estimators need: certificates, checks, a comparison.

`certify` asks a layer of any make whether the laws of mixture-of-experts layers hold.

`gradcheck` compares a layer's gradient with its derivative. An estimator that replaces the
derivative on purpose declares by what, and `check_surrogate` compares with that.
`compare_estimators` measures how far each estimator's gradient is from that of the dense mixture.
"""

from torchmoe.testing._check_surrogate import check_surrogate
from torchmoe.testing._compare_estimators import (
    EstimatorComparison,
    EstimatorResult,
    compare_estimators,
)
from torchmoe.testing._gradcheck import gradcheck
from torchmoe.testing._observation import UnstableSelectionError
from torchmoe.testing.certify import Certificate, Finding, Law, NotAsked, certify, known_laws

__all__ = [
    "Certificate",
    "EstimatorComparison",
    "EstimatorResult",
    "Finding",
    "Law",
    "NotAsked",
    "UnstableSelectionError",
    "certify",
    "check_surrogate",
    "compare_estimators",
    "gradcheck",
    "known_laws",
]
