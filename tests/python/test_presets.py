"""The presets: they build and train, show all they set, and can be changed."""

from __future__ import annotations

import dataclasses
import inspect
from fractions import Fraction

import pytest
import torch
from torch.nn.functional import silu

from op_case import C
from torchmoe import expert_capacity, presets
from torchmoe.nn import Balance, Capacity, Experts, Gate, MoE, Router, SharedExperts
from torchmoe.presets import PRESETS, Preset

H, INNER, E = 6, 8, 16
EPS = torch.finfo(torch.float64).eps
EVERY = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Preset)
    if field.default is not dataclasses.MISSING
}
TEXTS = {"name", "description", "source", "sources", "differs"}


@EVERY
def test_builds_and_trains_a_step(preset: Preset) -> None:
    moe = preset.layer(H, INNER, E)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in moe.parameters()]
    x = torch.randn(3, 20, H)
    output = moe(x)
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters())
    optimizer.step()
    moe.update(output.routing)
    assert output.hidden_states.shape == x.shape
    assert output.aux_loss > 0
    assert not any(torch.equal(a, b) for a, b in zip(before, moe.parameters(), strict=True))


@EVERY
def test_has_the_arguments_it_shows(preset: Preset) -> None:
    moe = preset.layer(H, INNER, E)
    assert moe.top_k == preset.top_k
    assert moe.capacity == preset.capacity
    assert moe.balance == preset.balance
    assert moe.estimator.score_function == preset.gate.score_function
    assert moe.router.input_jitter == preset.input_jitter
    assert moe.router.logit_noise == preset.logit_noise
    assert (moe.selection_bias is not None) == (preset.balance.selection_bias_rate > 0)
    assert (moe.shared_experts is not None) == (preset.num_shared_experts > 0)
    losses = moe(torch.randn(10, H)).routing.losses
    assert ("router_z_loss" in losses) == (preset.balance.z_loss_weight > 0)


def test_sets_every_argument_of_the_layer_that_routes() -> None:
    """A new one must be thought about here."""
    of_the_caller = {
        *("hidden_size", "intermediate_size", "num_experts", "activation", "bias"),
        *("router", "experts", "shared_experts", "device", "dtype"),
        *("assistance", "cache", "process_group"),
    }
    arguments = {f.name for f in dataclasses.fields(Preset)} - TEXTS
    expected = set(inspect.signature(MoE).parameters) - of_the_caller
    assert arguments == expected | {"input_jitter", "logit_noise", "num_shared_experts"}


def values_of(preset: Preset) -> dict[str, object]:
    """Every argument by name, those of a Gate and the like one by one."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(Preset):
        value = getattr(preset, field.name)
        if isinstance(value, Balance | Gate | Capacity):
            parts = [f.name for f in dataclasses.fields(value) if f.init]
            values |= {f"{field.name}.{part}": getattr(value, part) for part in parts}
        elif field.name not in TEXTS:
            values[field.name] = value
    return values


@EVERY
def test_prints_every_argument(preset: Preset) -> None:
    _, _, arguments, *_ = str(preset).split("\n\n")
    values = values_of(preset)
    lines = arguments.splitlines()
    assert [line.split()[0] for line in lines] == list(values)
    for line, (name, value) in zip(lines, values.items(), strict=True):
        shown = line.split(maxsplit=1)[1]
        assert shown.startswith(repr(value))
        assert shown.removeprefix(repr(value)).strip() == preset.sources.get(name, "")


@EVERY
def test_every_value_has_a_source(preset: Preset) -> None:
    """Or is the layer's default, for what the original has nothing of."""
    values = values_of(preset)
    plain = values_of(dataclasses.replace(preset, **DEFAULTS))
    plain |= {f"capacity.{field.name}": field.default for field in dataclasses.fields(Capacity)}
    assert set(preset.sources) <= set(values)
    for name, value in values.items():
        assert name in preset.sources or value == plain.get(name), name


@EVERY
def test_prints_where_it_comes_from(preset: Preset) -> None:
    text = " ".join(str(preset).split())
    assert text.startswith(preset.name)
    for part in (preset.description, preset.source, *preset.differs):
        assert " ".join(part.split()) in text
    assert max(map(len, str(preset).splitlines())) <= 100


def test_names_are_those_of_the_module() -> None:
    assert list(PRESETS) == [
        *("switch", "gshard", "st_moe", "megatron", "deepspeed", "mixtral_hf", "deepseek_v3")
    ]
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert getattr(presets, name) is preset


# int(1.25 * T / E) and at least 4; 2 T / E; ceil(2 T / E); ceil(T / E) and at least 4.
@pytest.mark.parametrize(
    ("preset", "training", "expected"),
    [
        (presets.switch, True, {(100, 8): 15, (20, 16): 4, (3, 4): 3}),
        (presets.switch, False, {(100, 8): 25, (20, 16): 4, (3, 4): 3}),
        (presets.gshard, True, {(100, 8): 25, (20, 16): 2, (3, 4): 1}),
        (presets.st_moe, True, {(100, 8): 15, (20, 16): 4, (3, 4): 3}),
        (presets.st_moe, False, {(100, 8): 25, (20, 16): 4, (3, 4): 3}),
        (presets.megatron, True, {(100, 8): 25, (20, 16): 3, (3, 4): 2}),
        (presets.deepspeed, True, {(100, 8): 13, (20, 16): 4, (3, 4): 3}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_capacities_of_the_originals(
    preset: Preset, training: bool, expected: dict[tuple[int, int], int]
) -> None:
    capacity = preset.capacity
    factor = capacity.factor if training or capacity.eval_factor is None else capacity.eval_factor
    for (tokens, experts), slots in expected.items():
        computed = expert_capacity(
            tokens, experts, preset.top_k, factor, capacity.minimum, rounding=capacity.rounding
        )
        assert computed == slots
        moe = preset.layer(H, INNER, experts, input_jitter=0.0).train(training)
        with torch.no_grad():
            moe.router.weight[1:].zero_()  # one large logit: the first expert gets every token
            moe.router.weight[0].fill_(1.0)
        assert moe(torch.ones(tokens, H)).routing.kept_per_expert[0] == slots


def test_megatron_by_its_formulas() -> None:
    """Each expert keeps the largest combine weights of the tokens that chose it.

    The loss is coefficient * E / (K T^2) * sum over experts of sum(probs) * count.
    """
    tokens, experts = 64, 8
    moe = presets.megatron.layer(H, INNER, experts, dtype=torch.float64)
    with torch.no_grad():
        moe.router.weight.mul_(4)
    output = moe(torch.randn(tokens, H, dtype=torch.float64))
    routing = output.routing
    top, ids = routing.logits.topk(2)
    weights = torch.zeros(tokens, experts, dtype=torch.float64).scatter(1, ids, top.softmax(-1))
    capacity = 2 * tokens // experts
    best = weights.topk(capacity, dim=0).indices
    expected = torch.zeros(tokens, experts).scatter(0, best, 1.0).bool() & (weights > 0)
    slots = torch.where(routing.indices < 0, experts, routing.indices)
    kept = torch.zeros(tokens, experts + 1).scatter(1, slots, 1.0).bool()[:, :experts]
    assert torch.equal(kept, expected)
    assert 0 < kept.sum() < 2 * tokens
    torch.testing.assert_close(
        torch.zeros(tokens, experts + 1, dtype=torch.float64).scatter(1, slots, routing.weights)[
            :, :experts
        ],
        weights * expected,
        rtol=0.0,
        atol=C * 2 * EPS,  # a sum of two
    )

    counts = (weights > 0).sum(0)
    products = routing.logits.softmax(-1).sum(0) * counts
    loss = 0.01 * experts / (2 * tokens**2) * products.sum()
    torch.testing.assert_close(output.aux_loss, loss, rtol=0.0, atol=C * tokens * EPS * loss.item())


def test_deepseek_v3_balances_by_its_formulas() -> None:
    """Equations 17 to 20 of arXiv 2412.19437, each sequence on its own."""
    moe = presets.deepseek_v3.layer(H, INNER, E, dtype=torch.float64)
    length, top_k = 12, 8
    output = moe(torch.randn(3, length, H, dtype=torch.float64))
    losses = []
    for sequence in range(3):
        rows = slice(sequence * length, (sequence + 1) * length)
        scores = output.routing.logits[rows].sigmoid()
        shares = scores / scores.sum(-1, keepdim=True)
        counts = torch.bincount(output.routing.selected[rows].flatten(), minlength=E)
        losses.append(E / (top_k * length) * (counts * shares.mean(0)).sum())
    loss = 0.0001 * torch.stack(losses).mean()
    torch.testing.assert_close(output.aux_loss, loss, rtol=0.0, atol=C * length * EPS * loss.item())


def test_deepseek_moves_its_bias_against_the_load() -> None:
    moe = presets.deepseek_v3.layer(H, INNER, E)
    routing = moe(torch.randn(40, H)).routing
    moe.update(routing)
    load = routing.tokens_per_expert
    expected = 0.001 * (load.sum() / E - load).sign()
    torch.testing.assert_close(moe.selection_bias, expected, rtol=0.0, atol=0.0)


def plain_shared(x: torch.Tensor, shared: SharedExperts) -> torch.Tensor:
    """w2(silu(w1 x) * w3 x), DeepSeek-V3's MLP."""
    gate, up = (x @ shared.experts.gate_up_proj[0].T).chunk(2, dim=-1)
    return (silu(gate) * up) @ shared.experts.down_proj[0].T


@pytest.mark.parametrize("number", [1, 3])
def test_deepseek_v3_adds_its_shared_experts_unscaled(number: int) -> None:
    """Shared experts of one width are one of the sum of their widths."""
    options = {"dtype": torch.float64, "num_shared_experts": number}
    moe = presets.deepseek_v3.layer(H, INNER, E, **options)
    shared = moe.shared_experts
    assert shared.experts.intermediate_size == number * INNER
    x = torch.randn(20, H, dtype=torch.float64)
    moe.shared_experts = None
    routed = moe(x).hidden_states
    moe.shared_experts = shared
    atol = C * 2 * (H + number * INNER) * EPS
    torch.testing.assert_close(
        moe(x).hidden_states, routed + plain_shared(x, shared), rtol=0.0, atol=atol
    )
    moe.reset_parameters()
    bound = (number * INNER) ** -0.5
    assert 0.9 * bound < shared.experts.down_proj.abs().max() <= bound


def test_shared_experts_of_ones_own_or_none() -> None:
    own = torch.nn.Linear(H, H)
    assert presets.deepseek_v3.layer(H, INNER, E, shared_experts=own).shared_experts is own
    for changes in ({"shared_experts": None}, {"num_shared_experts": 0}):
        assert presets.deepseek_v3.layer(H, INNER, E, **changes).shared_experts is None
    moe = presets.mixtral_hf.layer(H, INNER, E, num_shared_experts=2, activation="relu", bias=True)
    assert moe.shared_experts.experts.activation == "relu"
    assert moe.shared_experts.experts.down_proj_bias is not None
    # The other parts are drawn as without them.
    layers = []
    for changes in ({}, {"shared_experts": None}):
        torch.manual_seed(3)
        layers.append(presets.deepseek_v3.layer(H, INNER, E, **changes))
    for name, value in layers[1].state_dict().items():
        assert torch.equal(layers[0].state_dict()[name], value)
    experts = Experts(H, INNER, E)
    message = r"^Preset: intermediate_size must be given for the shared experts' width, or shared_"
    with pytest.raises(ValueError, match=message):
        presets.deepseek_v3.layer(H, None, E, experts=experts)
    assert presets.deepseek_v3.layer(H, None, E, experts=experts, shared_experts=None)
    assert presets.deepseek_v3.layer(H, INNER, E, experts=experts).shared_experts is not None


def test_changes_replace_arguments() -> None:
    capacity = Capacity(Fraction(1, 3))
    balance = Balance(0.5)
    moe = presets.st_moe.layer(
        *(H, INNER, E),
        top_k=4,
        capacity=capacity,
        balance=balance,
        activation="relu",
        bias=True,
        input_jitter=0.25,
        logit_noise=0.125,
        dtype=torch.float64,
    )
    assert (moe.top_k, moe.capacity, moe.balance) == (4, capacity, balance)
    assert (moe.router.input_jitter, moe.router.logit_noise) == (0.25, 0.125)
    assert moe.experts.activation == "relu"
    assert moe.experts.down_proj_bias is not None
    assert {parameter.dtype for parameter in moe.parameters()} == {torch.float64}
    assert presets.st_moe.layer(H, INNER, E, capacity=None).capacity is None
    history = Balance(fraction_from="history")
    assert presets.megatron.layer(H, INNER, E, balance=history).router.usage is not None
    assert presets.st_moe.top_k == 2


def test_a_router_replaces_the_noise_too() -> None:
    router = Router(H, E, bias=True)
    moe = presets.switch.layer(H, INNER, E, router=router)
    assert moe.router is router
    assert router.input_jitter == 0
    assert presets.switch.layer(H, INNER, E, router=None).router.input_jitter == 0.01


def test_a_preset_of_ones_own() -> None:
    own = dataclasses.replace(presets.mixtral_hf, name="own", top_k=3)
    assert own.layer(H, INNER, E).top_k == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        own.top_k = 4


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        (
            {"capcity": None},
            TypeError,
            r"Preset: changes must be arguments of MoE, num_shared_experts, input_jitter or "
            r'logit_noise, got "capcity"$',
        ),
        ({"name": "x"}, TypeError, r'Preset: changes must be .*, got "name"$'),
        (
            {"router": Router(H, E), "input_jitter": 0.1},
            TypeError,
            r"Preset: input_jitter must be set on the router that is given, got 0.1 along with it$",
        ),
        ({"top_k": 17}, ValueError, r"MoE: top_k must be in \[1, 16\], got 17"),
        ({"input_jitter": -1.0}, ValueError, r"Router: input_jitter must be .*, got -1.0"),
        ({"num_shared_experts": -1}, ValueError, r"^Preset: num_shared_experts must be >= 0, got"),
        ({"num_shared_experts": 0.5}, TypeError, r"^Preset: num_shared_experts must be an int"),
        (
            {"num_shared_experts": 2, "shared_experts": None},
            TypeError,
            r"^Preset: num_shared_experts must not be given along with shared_experts, got 2$",
        ),
    ],
    ids=str,
)
def test_errors(changes: dict[str, object], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        presets.st_moe.layer(H, INNER, E, **changes)


def test_groups_must_divide_the_experts() -> None:
    with pytest.raises(ValueError, match="num_groups must"):
        presets.deepseek_v3.layer(H, INNER, 12)
