"""The exact derivative."""

from __future__ import annotations

from torchmoe.nn.estimators.estimator import Estimator


class Exact(Estimator):
    """The derivative of the weights as they are, at a fixed choice of experts."""
