"""What parts of a layer tell of themselves, so that others can see whether they go together.

A router or experts of the user's own, that inherit neither class below, are as the defaults say.
Estimators tell the same kind of things, see `Estimator`.
"""

from __future__ import annotations


class _Declaration:
    """Answers for itself also where another module has been put around it.

    What torch.compile, its checkpoint_wrapper and FullyShardedDataParallel put around a module
    passes on whatever is asked of it, but is of another class.
    """

    @property
    def _declaration(self) -> _Declaration:
        return self


class RouterDeclaration(_Declaration):
    """What a router tells.

    Attributes:
        chooses: whether it leaves no choice to anything else.
        scores_all: whether an expert that it does not choose may have a score above 0. Else nothing
            may lead a token to another expert.
        decides_for: "token", or "sequence" where all tokens of a sequence get one decision, which
            an estimator that draws the experts of each token would break.
        looks_ahead: why a token's decision may depend on later tokens of its sequence, as the end
            of a sentence that begins with the router's name; None if it never does.
        default_normalize: the normalisation of the weights where the gate leaves the choice; None
            leaves it to the estimator.
        tells_noise: whether it adds noise to its logits now, and tells it if called with
            as_output=True, see `torchmoe.nn.RouterOutput`.
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
    """What experts tell.

    Attributes:
        mixes_slots: whether what an expert gives depends on the token's other experts.
    """

    mixes_slots: bool = False


def declared_by_router(router: object) -> RouterDeclaration:
    """What a router tells, or the defaults."""
    told = getattr(router, "_declaration", None)
    return told if isinstance(told, RouterDeclaration) else RouterDeclaration()


def declared_by_experts(experts: object) -> ExpertsDeclaration:
    """What experts tell, or the defaults."""
    told = getattr(experts, "_declaration", None)
    return told if isinstance(told, ExpertsDeclaration) else ExpertsDeclaration()
