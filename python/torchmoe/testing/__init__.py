"""Tools for unit tests of layers, routers and estimators: certificates, checks, a comparison.

`certify` tests whether the laws of mixture-of-experts layers hold for any such layer.

`gradcheck` compares a layer's gradient with its derivative. An estimator that replaces the
derivative on purpose declares the replacement, and `check_surrogate` compares with that.
`compare_estimators` measures how far each estimator's gradient is from the dense mixture's.
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
