"""How the weights of the chosen experts are formed, and how their gradient is estimated."""

from __future__ import annotations

from dataclasses import dataclass

from torchmoe.nn._checks import check_choice
from torchmoe.nn.estimators.estimator import NORMALIZES, SCORE_FUNCTIONS, Estimator
from torchmoe.nn.estimators.registry import known_estimators


@dataclass(frozen=True)
class Gate:
    """The gate rule of a layer; the formulas are those of `torchmoe.ops.gate_weights`.

    Attributes:
        score_function: "softmax" or "sigmoid".
        normalize: "none", "topk" or "uniform"; None is the estimator's own choice, usually "topk"
            for top_k > 1 and "none" for top_k = 1.
        estimator: the gradient estimator: a registered name (`known_estimators()` lists them) or an
            `Estimator`, built with other settings or of your own, which becomes the layer's
            `estimator` submodule. Give each layer an instance of its own: one shared by two layers
            shares its parameters and its state.

    Raises:
        TypeError: estimator is neither a string nor an Estimator.
        ValueError: a name is unknown.
    """

    score_function: str = "softmax"
    normalize: str | None = None
    estimator: str | Estimator = "exact"

    def __post_init__(self) -> None:
        """Checks every field."""
        check_choice("Gate", "score_function", self.score_function, SCORE_FUNCTIONS)
        if self.normalize is not None:
            check_choice("Gate", "normalize", self.normalize, NORMALIZES)
        if isinstance(self.estimator, str):
            check_choice("Gate", "estimator", self.estimator, known_estimators())
        elif not isinstance(self.estimator, Estimator):
            raise TypeError(
                f"Gate: estimator must be a name or an Estimator, got {self.estimator!r}"
            )
