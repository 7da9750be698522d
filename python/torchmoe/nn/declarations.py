"""What parts of a layer declare, so that a layer can check whether they are compatible.

For a custom router or custom experts that inherit neither class below, the defaults hold.
Estimators make similar declarations, see `Estimator`.
"""

from __future__ import annotations


class _Declaration:
    """A declaration that can also be read through a wrapper module.

    The wrappers of torch.compile, checkpoint_wrapper and FullyShardedDataParallel pass on attribute
    access, but are of another class.
    """

    @property
    def _declaration(self) -> _Declaration:
        return self


class RouterDeclaration(_Declaration):
    """What a router declares.

    Attributes:
        chooses: whether it chooses the experts itself, so that nothing else may.
        scores_all: whether an expert that it does not choose may have a score above 0. If not,
            nothing may send a token to another expert.
        decides_for: "token", or "sequence" if all tokens of a sequence share one decision, which an
            estimator that draws experts for each token would break.
        looks_ahead: why a token's decision may depend on later tokens of its sequence, as the end
            of a sentence that begins with the router's name; None if it never does.
        default_normalize: the normalisation of the weights if the gate does not set one; None
            leaves it to the estimator.
        tells_noise: whether it adds noise to its logits now, and returns the clean logits too if
            called with as_output=True, see `torchmoe.nn.RouterOutput`.
        keeps_usage: whether it has `usage`, which its `update` moves.
        reads_usage: whether it reads its own usage.
    """

    chooses: bool = False
    scores_all: bool = True
    decides_for: str = "token"
    looks_ahead: str | None = None
    default_normalize: str | None = None
    tells_noise: bool = False
    keeps_usage: bool = False
    reads_usage: bool = False


class ExpertsDeclaration(_Declaration):
    """What experts declare.

    Attributes:
        mixes_slots: whether an expert's output depends on the token's other experts.
    """

    mixes_slots: bool = False


def declared_by_router(router: object) -> RouterDeclaration:
    """What a router declares, or the defaults."""
    told = getattr(router, "_declaration", None)
    return told if isinstance(told, RouterDeclaration) else RouterDeclaration()


def declared_by_experts(experts: object) -> ExpertsDeclaration:
    """What experts declare, or the defaults."""
    told = getattr(experts, "_declaration", None)
    return told if isinstance(told, ExpertsDeclaration) else ExpertsDeclaration()
