"""How experts are ranked, and how their weights are formed and differentiated."""

from __future__ import annotations

from dataclasses import dataclass

from torchmoe._checks import check_at_least, check_choice, shown
from torchmoe.nn._settings import Settings
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.nn.estimators.registry import known_estimators
from torchmoe.ops import NORMALIZES, SCORE_FUNCTIONS


@dataclass(frozen=True, repr=False)
class Gate(Settings):
    """The gate rule of a layer; the formulas are those of `torchmoe.ops.gate_weights`.

    Attributes:
        score_function: "softmax" or "sigmoid".
        normalize: "none", "topk" or "uniform"; None is the estimator's own choice, usually "topk"
            for top_k > 1 and "none" for top_k = 1.
        estimator: the gradient estimator: a registered name (`known_estimators()` lists them), or
            an `Estimator` with other settings or of your own class, which becomes the layer's
            `estimator` submodule. Give each layer its own instance: two layers that share one also
            share its parameters and state.
        num_groups: divides the experts into this many groups of neighbours. Above 1 a token's
            experts come from its `top_groups` best groups only, where a group's score is the sum of
            its two best experts' score_function(logits) + selection bias (DeepSeek-V3, arXiv
            2412.19437). The other groups' scores count as -inf.
        top_groups: how many groups a token chooses from.

    Raises:
        TypeError: estimator is neither a string nor an Estimator, or a number is not an int.
        ValueError: a name is unknown, or a number out of range.
    """

    score_function: str = "softmax"
    normalize: str | None = None
    estimator: str | Estimator = "exact"
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        check_choice("Gate", "score_function", self.score_function, SCORE_FUNCTIONS)
        if self.normalize is not None:
            check_choice("Gate", "normalize", self.normalize, NORMALIZES)
        if isinstance(self.estimator, str):
            check_choice("Gate", "estimator", self.estimator, known_estimators())
        elif not isinstance(self.estimator, Estimator):
            raise TypeError(
                f"Gate: estimator must be a name or an Estimator, got {shown(self.estimator)}"
            )
        check_at_least("Gate", "num_groups", self.num_groups, 1)
        check_at_least("Gate", "top_groups", self.top_groups, 1)
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"Gate: top_groups must be in [1, {self.num_groups}], the number of groups, "
                f"got {self.top_groups}"
            )
