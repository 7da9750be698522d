"""The numbers of the story: each step computed by the library and handed out as a small dataclass.

Nothing here repeats a formula of the library. A step calls the op or the layer that does the work
in a real model too, so that what is printed is what the library does.

Shapes: S tokens of the sentence, T sentences of a batch, H features, E experts, K chosen experts.
The names of experts and features, and the matrices they come from, are made up, and small enough
to follow with a pencil.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import torchmoe
from torchmoe import ops
from torchmoe.nn import Assistance, Experts, Gate, MoE, Router, SequenceRouter

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


def make_layer(router: Router, *, balance_weight: float, assisted: bool = False) -> MoE:
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
        balance=torchmoe.nn.Balance(
            balance_weight, fraction_from="history" if assisted else "batch"
        ),
        router=router,
        experts=experts,
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


# ---- one decision


@dataclass(frozen=True)
class Pooling:
    """A sentence becomes one gate input."""

    tokens: Tensor
    """[S, H]."""
    query: Tensor
    """[H]."""
    weights: Tensor
    """[S], how much each token counts."""
    gate_input: Tensor
    """[H], their mean with those weights."""


def pool() -> Pooling:
    """Attention pooling of the sentence, with the fixed query."""
    router = SequenceRouter(make_router(usage_scaling=False), pooling="attention")
    query = router.query
    assert isinstance(query, Tensor)
    tokens = vector(TOKEN_MATRIX)
    with torch.no_grad():
        query.copy_(vector(QUERY))
        details = router(tokens.unsqueeze(0)).details  # a batch of one sentence
    return Pooling(
        tokens, query.detach(), details["pooling_weights"][0], details["gate_input"].flatten()
    )


@dataclass(frozen=True)
class Decision:
    """What the gate makes of one gate input."""

    gate_input: Tensor
    """[H]."""
    logits: Tensor
    """[E]."""
    probabilities: Tensor
    """[E]."""
    chosen: list[int]
    """K experts, the best first."""
    weights: Tensor
    """[K], of the chosen experts' outputs."""
    match: Tensor
    """[E], in percent: 100 where the gate input points where the expert's row of W_g does."""


@torch.no_grad()
def decide(gate_input: Tensor) -> Decision:
    """Logits, softmax, the top 2 and their weights."""
    router = make_router(usage_scaling=False)
    x = gate_input.unsqueeze(0)  # a batch of one
    logits = ops.router_logits(x, router.weight, router.bias)
    chosen = ops.select_experts(logits, TOP_K)
    weights = ops.gate_weights(
        logits, chosen, score_function="softmax", normalize="topk", estimator="straight_through"
    )
    match = torchmoe.geometry(router).match_percentages(x)
    return Decision(
        gate_input, logits[0], probabilities(logits)[0], chosen[0].tolist(), weights[0], match[0]
    )


@dataclass(frozen=True)
class Balance:
    """The loss that keeps the experts in even use."""

    fraction: Tensor
    """[E], each expert's share of the slots."""
    loss: float
    """N sum f P."""
    weighted: float
    """Lambda times that, as it is added to the task's loss."""


@torch.no_grad()
def balance(gate_input: Tensor) -> Balance:
    """The balancing loss of this one decision."""
    layer = make_layer(make_router(usage_scaling=False), balance_weight=BALANCE_WEIGHT)
    output = layer(gate_input.unsqueeze(0))
    slots = output.routing.tokens_per_expert
    loss = output.routing.losses["load_balancing_loss"]
    return Balance(slots.to(DTYPE) / slots.sum(), loss.item(), output.aux_loss.item())


# ---- what the gate learns from it


@dataclass(frozen=True)
class Gradient:
    """From the error of the output back to W_g, with the plain gate and the one that is scaled."""

    answers: Tensor
    """[K, H], what the chosen experts answer."""
    output: Tensor
    """[H], their sum with the gate's weights."""
    loss: float
    """Half the squared distance from WANTED."""
    output_gradient: Tensor
    """[H], dL/dy."""
    weight_gradient: Tensor
    """[K], dL/dw, which straight-through takes for dL/dp of the chosen experts."""
    logit_gradient: Tensor
    """[E], dL/dz."""
    plain: Tensor
    """[E, H], dL/dW_g."""
    usage: Tensor
    """[E], each expert's share of the slots so far."""
    scaled: Tensor
    """[E, H], dL/dW_g where the rows are scaled by 1 - usage."""


def differentiate(gate_input: Tensor) -> Gradient:
    """One backward pass through a layer, and another through one that scales by usage."""
    x = gate_input.unsqueeze(0)
    matrices = []
    for usage_scaling in (False, True):
        router = make_router(usage_scaling=usage_scaling)
        router.usage_decay = 0.0  # the slots so far are all the history there is
        slots = torch.tensor(SLOTS_SO_FAR)
        router.update(slots, slots.sum())
        layer = make_layer(router, balance_weight=0.0)
        y, _, routing = layer(x)
        loss = (y - vector(WANTED)).square().sum() / 2
        to_y, to_w, to_z, to_matrix = torch.autograd.grad(
            loss, [y, routing.weights, routing.logits, router.weight], retain_graph=True
        )
        matrices.append(to_matrix)
    chosen = routing.indices.T  # [K, 1]
    with torch.no_grad():
        alone = torch.ones(chosen.shape, dtype=DTYPE)
        answers = layer.experts(x.expand(TOP_K, -1), chosen, alone)
    plain, scaled = matrices
    return Gradient(
        answers,
        y[0].detach(),
        loss.item(),
        to_y[0],
        to_w[0],
        to_z[0],
        plain,
        usage_of(router),
        scaled,
    )


@dataclass(frozen=True)
class Task:
    """One of the tasks in a row, as it is when the sentence comes."""

    usage: Tensor
    """[E], each expert's share of the slots so far."""
    probabilities: Tensor
    """[E]."""
    served_by: list[int]
    """The experts at work, the backup last where it has joined."""
    weight: float
    """The favourite's in the output."""
    loss: float
    """N sum f P, with f = usage."""
    part: float
    """The favourite's term of that sum."""
    weighted: float
    """Lambda times the loss: what the gate is trained by."""


@dataclass(frozen=True)
class Row:
    """Tasks in a row, and what is left of them."""

    tasks: list[Task]
    usage: Tensor
    """[E], after the last task."""
    logits: Tensor
    """[E], after the last task."""


def repeat(gate_input: Tensor) -> Row:
    """The same sentence again and again, after each the gate takes a step down the loss."""
    router = make_router(usage_scaling=True)
    router.usage_decay = USAGE_DECAY
    layer = make_layer(router, balance_weight=BALANCE_WEIGHT, assisted=True)
    optimizer = torch.optim.SGD(router.parameters(), lr=LEARNING_RATE)
    x = gate_input.unsqueeze(0)
    tasks = []
    for _ in range(TASKS):
        output = layer(x)
        tasks.append(look_at(output.routing, usage_of(router), output.aux_loss.item()))
        optimizer.zero_grad()
        output.aux_loss.backward()
        optimizer.step()
        layer.update(output.routing)
    with torch.no_grad():
        return Row(tasks, usage_of(router), router(x)[0])


@torch.no_grad()
def look_at(routing: torchmoe.nn.Routing, usage: Tensor, weighted: float) -> Task:
    """What one task shows."""
    of_favourite = torch.zeros_like(usage)
    of_favourite[POETRY] = usage[POETRY]
    part = ops.load_balancing_loss(routing.logits, of_favourite, score_function="softmax")
    served_by = routing.indices[0].tolist()
    return Task(
        usage,
        probabilities(routing.logits)[0],
        [expert for expert in served_by if expert >= 0],
        routing.weights[0, served_by.index(POETRY)].item(),
        routing.losses["load_balancing_loss"].item(),
        part.item(),
        weighted,
    )


# ---- where it ends


@dataclass(frozen=True)
class Room:
    """How many of a batch's slots each expert takes."""

    factor: Tensor
    """[E], max(1, load / mean load), to three decimals, rounded up."""
    even: int
    """Slots of each expert without history."""
    capacity: Tensor
    """[E], slots of each expert with it."""
    wanted: Tensor
    """[T, K], the experts that each sentence chooses."""
    served_evenly: Tensor
    """[T, K], the same after the even capacity; -1 = refused."""
    served: Tensor
    """[T, K], the same after the capacity with history."""


def fill(row: Row) -> Room:
    """A batch of such sentences at once, more than the favourite has room for."""
    experts = len(EXPERTS)
    slots = TOP_K * SENTENCES_AT_ONCE
    factor = torchmoe.dynamic_capacity(row.usage, experts * FINE_SLOTS) / FINE_SLOTS
    even = torchmoe.expert_capacity(SENTENCES_AT_ONCE, experts, TOP_K, 1)
    capacity = torchmoe.dynamic_capacity(row.usage, slots)
    wanted = ops.select_experts(row.logits.expand(SENTENCES_AT_ONCE, -1), TOP_K)
    return Room(
        factor,
        even,
        capacity,
        wanted,
        ops.limit_capacity(wanted, even, num_experts=experts),
        ops.limit_capacity(wanted, capacity),
    )


def refusal(gate_input: Tensor) -> str:
    """What the library says to a gate of one expert whose weight is 1 whatever it learns."""
    router = make_router(usage_scaling=False)
    logits = router(gate_input.unsqueeze(0))
    try:
        ops.gate_weights(
            logits,
            ops.select_experts(logits.detach(), 1),
            score_function="softmax",
            normalize="topk",
            estimator="exact",
        )
    except ValueError as error:
        return str(error)
    raise AssertionError("the library accepts a gate that could never learn")


@dataclass(frozen=True)
class Story:
    """All of it."""

    pooling: Pooling
    decision: Decision
    fixed: Decision
    balance: Balance
    gradient: Gradient
    row: Row
    room: Room
    refusal: str


def compute() -> Story:
    """The whole story, in order."""
    pooling = pool()
    row = repeat(pooling.gate_input)
    return Story(
        pooling,
        decide(pooling.gate_input),
        decide(vector(FIXED_INPUT)),
        balance(pooling.gate_input),
        differentiate(pooling.gate_input),
        row,
        fill(row),
        refusal(pooling.gate_input),
    )
