"""What unit tests of routers and estimators need: checks of their gradients, and a comparison.

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

__all__ = [
    "EstimatorComparison",
    "EstimatorResult",
    "UnstableSelectionError",
    "check_surrogate",
    "compare_estimators",
    "gradcheck",
]
