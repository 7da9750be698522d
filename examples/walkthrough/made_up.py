"""What is made up: the words, the experts' names, the matrices, and the layer they stand in.

All of it is small enough to follow with a pencil; the library does the rest.

Shapes, here and in the steps: S tokens of the sentence, T sentences of a batch, H features, E
experts, K chosen experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmoe import RoutingCache, ops
from torchmoe.nn import Assistance, Balance, Experts, Gate, MoE, Router

DTYPE = torch.float64  # what a pencil finds agrees in every digit that is shown
TOKENS = ("write", "a", "about", "quantum physics", "love poem")
SENTENCE = "write a love poem about quantum physics"
TOKEN_MATRIX = (
    (1.6, 0.8, -0.3, 2.1),
    (0.2, 1.5, 0.7, -0.4),
    (-0.5, 1.2, 0.9, 1.0),
    (2.3, -0.6, 1.8, 0.5),
    (1.1, 2.0, -1.2, 0.9),
)
PARAPHRASE = "compose a love poem about quantum physics"
PARAPHRASED_MATRIX = ((1.4, 1.0, -0.1, 1.9), *TOKEN_MATRIX[1:])  # "compose" is near "write"
FEATURES = ("x1", "x2", "x3", "x4")
# It points where the words with content point, and away from "a" and "about".
QUERY = (2.0, 1.0, 0.0, -0.3)

EXPERTS = ("poetry", "maths", "dialogue", "prose", "grammar", "facts", "science", "code")
POETRY, PROSE, SCIENCE = 0, 3, 6
GATE_WEIGHT = (
    (0.9, 1.2, -0.3, 0.7),
    (0.6, -0.8, 0.9, 0.1),
    (0.1, 0.9, -0.2, 0.3),
    (0.4, 0.1, 0.3, 1.2),
    (-0.5, 0.6, 0.3, -0.4),
    (-0.2, 0.5, 0.7, 0.4),
    (1.4, -0.5, 1.3, 0.2),
    (-0.3, -0.6, 0.9, 0.8),
)
# With these a gate input of FIXED_INPUT has FIXED_LOGITS exactly.
GATE_BIAS = (0.47, -0.19, -0.04, 0.47, 0.18, -0.09, 0.59, -0.24)
FIXED_INPUT = (1.8, 0.7, 1.2, 0.9)
FIXED_LOGITS = (3.2, 1.5, 0.8, 2.7, -0.3, 1.1, 4.5, 0.6)
TOP_K = 2
BALANCE_WEIGHT = 0.01  # lambda

INNER_SIZE = 8  # of an expert
SEED = 0  # of the experts' own weights
WANTED = (-0.5, 0.5, 0.5, -0.5)  # the output that the task asks for
SLOTS_SO_FAR = (40, 5, 5, 10, 5, 5, 25, 5)  # a history in which poetry is everybody's favourite

TASKS = 10
USAGE_DECAY = 0.9  # a memory of ten tasks; the library's 0.99 is one of a hundred
LEARNING_RATE = 2.0
BACKUP = (3, 6, 3, 0, 3, 6, 1, 1)  # the expert nearest in kind, by expert
THRESHOLD, LOWER_THRESHOLD, PATIENCE = 2.0, 1.5, 3
SENTENCES_AT_ONCE = 8
FINE_SLOTS = 1000  # per expert: so many that a capacity shows its factor to three decimals


def make_router(*, usage_scaling: bool) -> Router:
    """The gate of the story: W_g and b_g, and a record of how much each expert is used."""
    router = Router(
        len(GATE_WEIGHT[0]),
        len(GATE_WEIGHT),
        bias=True,
        usage_scaling=usage_scaling,
        track_usage=True,
        dtype=DTYPE,
    )
    with torch.no_grad():
        router.weight.copy_(vector(GATE_WEIGHT))
        router.bias.copy_(vector(GATE_BIAS))
    return router


def make_layer(
    router: Router,
    *,
    balance_weight: float,
    assisted: bool = False,
    cache: RoutingCache | None = None,
) -> MoE:
    """That gate before eight small networks, whose weights are drawn with a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        experts = Experts(router.hidden_size, INNER_SIZE, router.num_experts, dtype=DTYPE)
    assistance = None
    if assisted:
        assistance = Assistance(
            BACKUP, threshold=THRESHOLD, lower_threshold=LOWER_THRESHOLD, patience=PATIENCE
        )
    return MoE(
        router.hidden_size,
        None,
        router.num_experts,
        TOP_K,
        gate=Gate(normalize="topk", estimator="straight_through"),
        assistance=assistance,
        balance=Balance(balance_weight, fraction_from="history" if assisted else "batch"),
        router=router,
        experts=experts,
        cache=cache,
    )


def usage_of(router: Router) -> Tensor:
    """Each expert's share of the slots so far, as it is now, [E]."""
    assert router.usage is not None
    return router.usage.clone()


def vector(values: object) -> Tensor:
    """Numbers as a tensor of the story's precision."""
    return torch.tensor(values, dtype=DTYPE)


def probabilities(logits: Tensor) -> Tensor:
    """The softmax over all experts, [T, E], as the library's gate takes it."""
    ids = torch.arange(logits.shape[-1]).expand(logits.shape)
    return ops.gate_weights(
        logits, ids, score_function="softmax", normalize="none", estimator="exact"
    )
