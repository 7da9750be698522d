"""What every router keeps inside a layer, whatever its formula."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from built_in import ROUTERS as BUILT_IN
from built_in import make_router, without
from copies import by_pickle, load_state
from float_types import AUTOCAST, NARROW
from plain_moe import gradients, tensors_of
from torchmoe.nn import (
    Balance,
    Capacity,
    CosineRouter,
    ExpertChoiceRouter,
    HashRouter,
    MoE,
    MoEOutput,
    Router,
    SequenceRouter,
)

H, INNER, E, K, B, S = 6, 7, 5, 2, 3, 8
F64 = torch.float64

Make = Callable[..., nn.Module]  # from hidden size, number of experts, and dtype and device


def sequence(pooling: str, inner: Make = Router) -> Make:
    return lambda *sizes, **kind: SequenceRouter(inner(*sizes, **kind), pooling=pooling)


def expert_choice(among: str) -> Make:
    return lambda *sizes, **kind: ExpertChoiceRouter(Router(*sizes, **kind), K, among=among)


ROUTERS: dict[str, Make] = {
    "linear": lambda *sizes, **kind: Router(*sizes, bias=True, usage_scaling=True, **kind),
    "module": nn.Linear,
    "cosine": lambda *sizes, **kind: CosineRouter(*sizes, usage_scaling=True, **kind),
    "hash": lambda _size, experts, **_kind: HashRouter(experts, K),
    "sequence_attention": sequence("attention", CosineRouter),
    "sequence_given": sequence("given"),
    "sequence_mean": sequence("mean"),
    "sequence_first": sequence("first"),
    "expert_choice_batch": expert_choice("batch"),
    "expert_choice_sequence": expert_choice("sequence"),
}
NAMED = [type(make(H, E)) for make in ROUTERS.values()]
ROUTERS |= {
    name: lambda *sizes, kind=kind, **options: make_router(kind, *sizes, K, **options)
    for name, kind in without(NAMED).items()
}
NAMES = tuple(ROUTERS)
every_router = pytest.mark.parametrize("name", NAMES)
# nn.Linear is torch's own, which autocast and threads treat as they like.
every_router_of_ours = pytest.mark.parametrize("name", [n for n in NAMES if n != "module"])


def make(name: str, hidden_size: int = H, num_experts: int = E, **options: Any) -> MoE:
    kind = {key: options[key] for key in ("dtype", "device") if key in options}
    router = ROUTERS[name](hidden_size, num_experts, **kind)
    if getattr(router, "query", None) is not None and "device" not in kind:
        nn.init.normal_(router.query)
    moe = MoE(hidden_size, INNER, num_experts, K, bias=True, router=router, **options)
    if getattr(router, "usage", None) is not None and "device" not in kind:
        router.usage.copy_(torch.rand(num_experts))
    return moe


def read_by(name: str, x: Tensor) -> Tensor | None:
    """The router_input that goes with x."""
    if name == "hash":
        return (x.detach()[..., 0].nan_to_num() * 1000).to(torch.int64)
    if name == "sequence_given":
        return x.detach()[..., 0].nan_to_num().abs() + 0.1
    return None


def step(
    name: str, moe: MoE, x: Tensor, run: Callable[..., Any] | None = None, **options: Any
) -> dict[str, Tensor]:
    """Outputs and gradients of one forward and backward pass, of the layer itself or `run`."""
    moe.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    given = options.pop("given", None)
    given = read_by(name, x) if given is None else given
    if given is not None and given.is_floating_point():
        given = given.clone().requires_grad_()
    output = MoEOutput(*(moe if run is None else run)(leaf, router_input=given, **options))
    (output.hidden_states.square().sum() + output.aux_loss).backward()
    found = {"y": output.hidden_states, "aux_loss": output.aux_loss, "x": leaf.grad}
    found |= tensors_of(output.routing) | output.routing.details | gradients(moe)
    if given is not None and given.requires_grad:
        found["given"] = given.grad
    return {key: value.detach() for key, value in found.items()}


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_the_page_on_gating_shows_them_all() -> None:
    text = (Path(__file__).parents[4] / "docs" / "gates.md").read_text()
    table = text.partition("\n## ")[0]
    rows = set(re.findall(r"^\| `(\w+)", table, flags=re.MULTILINE))
    assert rows == {kind.__name__ for kind in BUILT_IN}
    for name in rows:
        assert re.search(rf"^[^|]*\b{name}\(", text, flags=re.MULTILINE), f"no snippet for {name}"


@every_router
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_once_for_all_lengths(name: str, masked: bool) -> None:
    moe = make(name, capacity=Capacity(1.1), dtype=F64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((3, 8), (2, 5), (4, 11)):
        x = torch.randn(*shape, H, dtype=F64)
        mask = torch.rand(shape) > 0.3 if masked else None
        expected = step(name, moe, x, token_mask=mask)
        actual = step(name, moe, x, compiled, token_mask=mask)
        assert_close(actual, expected, rtol=0, atol=1e-12)
        assert torch.equal(actual["selected"], expected["selected"])
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cosine", "hash", "sequence_attention", "expert_choice_sequence"])
def test_inductor(name: str) -> None:
    moe = make(name, dtype=F64)
    compiled = torch.compile(moe, fullgraph=True, dynamic=True)
    mask = torch.rand(B, S) > 0.3
    x = torch.randn(B, S, H, dtype=F64)
    expected = step(name, moe, x, token_mask=mask)
    assert_close(step(name, moe, x, compiled, token_mask=mask), expected, rtol=0, atol=1e-12)


@every_router_of_ours
@pytest.mark.parametrize("dtype", AUTOCAST)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    moe = make(name, capacity=Capacity(1.1))
    x = torch.randn(B, S, H)
    mask = torch.rand(B, S) > 0.3
    given = read_by(name, x)
    plain = moe(x, token_mask=mask, router_input=given)
    with torch.autocast("cpu", dtype=dtype):
        output = moe(x, token_mask=mask, router_input=given)
    assert output.hidden_states.dtype == dtype
    routing = output.routing
    assert routing.logits.dtype == torch.float32
    expected = tensors_of(plain.routing) | plain.routing.details
    check_equal(tensors_of(routing) | routing.details, expected)
    (output.hidden_states.float().square().sum() + output.aux_loss).backward()
    for gradient in gradients(moe).values():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@every_router
def test_autocast_around_narrow_activations(name: str) -> None:
    moe = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = nn.Linear(H, H)(torch.randn(B, S, H))
        given = read_by(name, hidden)
        output = moe(hidden, router_input=given)
    assert output.hidden_states.dtype == torch.bfloat16
    assert output.routing.logits.dtype == torch.float32
    (output.hidden_states.float().sum() + output.aux_loss).backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(moe).values())


@every_router
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_parameters(name: str, dtype: torch.dtype) -> None:
    moe = make(name).to(dtype)
    x = torch.randn(B, S, H).to(dtype)
    seen = step(name, moe, x)
    assert seen["y"].dtype == seen["x"].dtype == dtype
    assert seen["logits"].dtype == seen["weights"].dtype == torch.float32
    assert all(value.isfinite().all() for value in seen.values())
    assert all(p.grad.dtype == p.dtype == dtype for p in moe.parameters())
    made = make(name, dtype=dtype)
    assert {p.dtype for p in made.parameters()} == {dtype}


@every_router
def test_masked_tokens_have_no_part_in_it(name: str) -> None:
    moe = make(name, dtype=F64)
    x = torch.randn(B, S, H, dtype=F64)
    mask = torch.arange(S) < torch.tensor([5, 0, 8]).unsqueeze(1)
    clean = read_by(name, x)
    seen = []
    for filler in (0.0, 1e3, torch.nan):
        spoiled = x.masked_fill(~mask.unsqueeze(-1), filler)
        given = clean
        if clean is not None:
            given = clean.masked_fill(~mask, filler if clean.is_floating_point() else 7)
        seen.append(step(name, moe, spoiled, token_mask=mask, given=given))
    for key in ("y", "x", *(["given"] if "given" in seen[0] else [])):
        assert (seen[0][key][~mask] == 0).all(), key
    assert (seen[0]["selected"][~mask.flatten()] == -1).all()
    for other in seen[1:]:
        check_equal(other, seen[0])
    # The sequences alone, without what pads them.
    if name != "expert_choice_batch":
        for b, length in ((0, 5), (2, 8)):
            own = None if clean is None else clean[b, :length]
            assert_close(
                moe(x[b, :length], router_input=own).hidden_states, seen[0]["y"][b, :length]
            )


@every_router
def test_every_token_masked(name: str) -> None:
    moe = make(name)
    seen = step(name, moe, torch.randn(B, S, H), token_mask=torch.zeros(B, S, dtype=torch.bool))
    assert (seen["y"] == 0).all()
    assert (seen["selected"] == -1).all()
    assert all(value.isfinite().all() for value in seen.values())
    assert all((gradient == 0).all() for gradient in gradients(moe).values())


@every_router
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies(name: str, way: str) -> None:
    moe = make(name)
    moe.update(moe(x := torch.randn(B, S, H), router_input=read_by(name, x)).routing)
    if way == "state_dict":
        other = load_state(make(name), moe)
    else:
        other = copy.deepcopy(moe) if way == "deepcopy" else by_pickle(moe)
    assert list(other.state_dict()) == list(moe.state_dict())
    check_equal(step(name, other, x), step(name, moe, x))
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.add_(1)
    for key, value in moe.state_dict().items():
        assert not torch.equal(other.state_dict()[key], value), key


@every_router
def test_empty_layers(name: str) -> None:
    with torch.device("meta"):
        moe = make(name, device="meta")
    assert all(tensor.is_meta for tensor in moe.state_dict().values())
    x = torch.empty(B, S, H, device="meta")
    given = {
        "hash": torch.empty(B, S, dtype=torch.int64, device="meta"),
        "sequence_given": torch.empty(B, S, device="meta"),
    }.get(name)
    assert moe(x, router_input=given).hidden_states.shape == (B, S, H)
    moe = moe.to_empty(device="cpu")
    for tensor in moe.state_dict().values():
        tensor.fill_(torch.nan)
    fresh = make(name)
    for each in (moe, fresh):
        torch.manual_seed(5)
        each.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in moe.state_dict().values())
    check_equal(moe.state_dict(), fresh.state_dict())


@every_router
def test_a_fresh_router_is_a_reset_one(name: str) -> None:
    torch.manual_seed(5)
    fresh = ROUTERS[name](H, E)
    router = ROUTERS[name](H, E)
    torch.manual_seed(5)
    if hasattr(router, "reset_parameters"):
        router.reset_parameters()
    check_equal(router.state_dict(), fresh.state_dict())


@every_router_of_ours
@pytest.mark.parametrize("shape", [(16, 515), (1, 8240)])
def test_number_of_threads_changes_nothing(name: str, shape: tuple[int, int]) -> None:
    # So many numbers that torch would share its sums among threads: 65920 logits and more.
    moe = make(name, 12, 8, capacity=Capacity(1.1))
    x = torch.randn(*shape, 12)
    mask = torch.rand(shape) > 0.1
    seen = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        seen.append(step(name, moe, x, token_mask=mask))
    for other in seen[1:]:
        check_equal(other, seen[0])


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("sequence")])
@pytest.mark.parametrize("shape", [(1, 70_001), (300, 515)])
def test_number_of_threads_changes_nothing_in_the_pooling(
    name: str, shape: tuple[int, int]
) -> None:
    # Torch's own sum depends on it with the one, and the gradient of its softmax with the other.
    router = ROUTERS[name](4, 3)
    if router.query is not None:
        nn.init.normal_(router.query)
    x = torch.randn(*shape, 4)
    seen = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        router.zero_grad()
        leaf = x.clone().requires_grad_()
        given = read_by(name, x)
        given = None if given is None else given.requires_grad_()
        output = router(leaf, given)
        output.logits[:, 0].backward(torch.tensor([1.0, -2.0, 3.0]).expand(shape[0], 3))
        found = [output.logits, *output.details.values(), leaf.grad, *gradients(router).values()]
        seen.append(found if given is None else [*found, given.grad])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, seen[0], strict=True))


@every_router
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(name: str, use_reentrant: bool) -> None:
    moe = make(name, capacity=Capacity(1.1))
    calls = []
    moe.router.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(B, S, H)
    before = copy.deepcopy(moe.state_dict())

    def run(x: Tensor, router_input: Tensor | None) -> Any:
        call = lambda *given: moe(given[0], router_input=given[1])  # noqa: E731
        return checkpoint(call, x, router_input, use_reentrant=use_reentrant)

    expected = step(name, moe, x)
    actual = step(name, moe, x, run)
    assert len(calls) == 3
    # What is nested in a tuple, reentrant checkpointing returns as it is.
    check_equal(actual, expected)
    check_equal(moe.state_dict(), before)


@every_router
def test_gradient_accumulation(name: str) -> None:
    x = torch.randn(4, S, H, dtype=F64)
    moe = make(name, dtype=F64, balance=Balance(weight=0.0))
    if name == "expert_choice_batch":
        pytest.skip("its choice depends on the batch")
    expected = step(name, moe, x)
    routing = moe(x, router_input=read_by(name, x)).routing
    other = copy.deepcopy(moe)
    other.zero_grad()
    routings = []
    for micro_batch in x:
        output = other(micro_batch, router_input=read_by(name, micro_batch))
        (output.hidden_states.square().sum() + output.aux_loss).backward()
        routings.append(output.routing)
    for key, gradient in gradients(other).items():
        assert_close(gradient, expected[key])
    before = copy.deepcopy(moe.state_dict())
    moe.update(routing)
    other.update(routings)
    assert_close(moe.state_dict(), other.state_dict())
    usage = getattr(moe.router, "usage", None)
    assert usage is None or not torch.equal(usage, before["router.usage"])


@every_router
@pytest.mark.parametrize("shape", [(0,), (1,), (0, S), (B, 0), (1, 1)])
def test_small_inputs(name: str, shape: tuple[int, ...]) -> None:
    moe = make(name)
    seen = step(name, moe, torch.randn(*shape, H))
    assert seen["y"].shape == (*shape, H)
    assert all(value.isfinite().all() for value in seen.values())
    moe.update(moe(x := torch.randn(*shape, H), router_input=read_by(name, x)).routing)
    assert all(buffer.isfinite().all() for buffer in moe.buffers())


@every_router
def test_inference_mode_and_evaluation(name: str) -> None:
    moe = make(name)
    x = torch.randn(B, S, H)
    expected = moe(x, router_input=read_by(name, x))
    moe.eval()
    with torch.inference_mode():
        output = moe(x, router_input=read_by(name, x))
    assert torch.equal(output.hidden_states, expected.hidden_states)
    assert torch.equal(output.routing.selected, expected.routing.selected)
    assert not output.aux_loss.requires_grad


@every_router
def test_forward_changes_no_state(name: str) -> None:
    moe = make(name)
    before = copy.deepcopy(moe.state_dict())
    x = torch.randn(B, S, H)
    check_equal(step(name, moe, x), step(name, moe, x))
    check_equal(moe.state_dict(), before)


@every_router
def test_one_expert(name: str) -> None:
    if name in ("hash", "expert_choice_batch", "expert_choice_sequence"):
        pytest.skip("made for two experts of each token")
    moe = MoE(H, INNER, 1, 1, router=ROUTERS[name](H, 1))
    x = torch.randn(B, S, H)
    output = moe(x, router_input=read_by(name, x))
    assert (output.routing.selected == 0).all()
    assert_close(output.routing.weights, torch.ones(B * S, 1))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cosine", "CosineRouter(hidden_size=6, num_experts=5, projection_size=2"),
        ("hash", "HashRouter(num_experts=5, top_k=2, seed=0)"),
        ("sequence_mean", "SequenceRouter(\n    pooling='mean'\n    (router): Router("),
        (
            "expert_choice_batch",
            "ExpertChoiceRouter(\n    top_k=2, among='batch', most_per_token=5",
        ),
    ],
)
def test_repr(name: str, text: str) -> None:
    assert text in repr(make(name))
