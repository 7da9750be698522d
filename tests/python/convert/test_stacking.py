"""stack_experts and unstack_experts: bit-equal round trips, and errors that name the entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from float_types import FLOATS
from torchmoe import nn as moe_nn
from torchmoe.convert import stack_experts, unstack_experts

E, H, I = 3, 4, 6  # noqa: E741  the glossary's letters
LLAMA, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
PLAIN = [("up_proj", "down_proj"), ("fc1", "fc2"), ("linear1", "linear2"), ("0", "2")]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def one_by_one(
    names: tuple[str, ...],
    prefix: str = "experts.",
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    num_experts: int = E,
) -> dict[str, Tensor]:
    state = {}
    for expert in range(num_experts):
        for name in names:
            shape = (H, I) if name == names[-1] else (I, H)
            state[f"{prefix}{expert}.{name}.weight"] = drawn(*shape, dtype=dtype)
            if bias:
                state[f"{prefix}{expert}.{name}.bias"] = drawn(shape[0], dtype=dtype)
    return state


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(actual) == list(expected) and all(
        a.dtype == e.dtype and torch.equal(a.view(torch.uint8), e.contiguous().view(torch.uint8))
        for a, e in zip(actual.values(), expected.values(), strict=True)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("names", [LLAMA, MIXTRAL, *PLAIN], ids=lambda names: names[0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_there_and_back(dtype: torch.dtype, names: tuple[str, ...], bias: bool) -> None:
    state = {"embedding.weight": drawn(5, H)}
    state |= one_by_one(names, "layers.0.mlp.experts.", bias, dtype)
    state |= {"layers.0.mlp.shared_experts.gate_proj.weight": drawn(I, H)}
    state |= one_by_one(names, "layers.1.mlp.experts.", bias, dtype)
    state |= {"head.weight": drawn(5, H)}
    stacked = stack_experts(state, num_experts=E)
    outer = "gate_up_proj" if len(names) == 3 else "up_proj"
    of_layer = [outer, *([outer + "_bias"] if bias else []), "down_proj"]
    of_layer += ["down_proj_bias"] if bias else []
    assert list(stacked) == [
        "embedding.weight",
        *(f"layers.0.mlp.experts.{name}" for name in of_layer),
        "layers.0.mlp.shared_experts.gate_proj.weight",
        *(f"layers.1.mlp.experts.{name}" for name in of_layer),
        "head.weight",
    ]
    rows = I * (len(names) - 1)
    assert stacked[f"layers.0.mlp.experts.{outer}"].shape == (E, rows, H)
    assert stacked["layers.1.mlp.experts.down_proj"].shape == (E, H, I)
    assert stacked["head.weight"] is state["head.weight"]
    assert same_bits(unstack_experts(stacked, names=names), state)


def test_back_and_there() -> None:
    layer = moe_nn.Experts(H, I, E, bias=True)
    state = dict(layer.state_dict(prefix="experts."))
    apart = unstack_experts(state, names=MIXTRAL)
    assert set(apart) == set(one_by_one(MIXTRAL, bias=True))
    again = stack_experts(apart, num_experts=E)
    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_numbers_that_are_none_keep_their_bits() -> None:
    state = one_by_one(LLAMA)
    for tensor in state.values():
        tensor.view(torch.int32).random_(-(2**31), 2**31 - 1)
    spread = {name: tensor.mT.contiguous().mT for name, tensor in state.items()}
    assert same_bits(unstack_experts(stack_experts(spread, num_experts=E)), state)


def test_nothing_is_computed_on_meta() -> None:
    state = {name: tensor.to("meta") for name, tensor in one_by_one(LLAMA).items()}
    stacked = stack_experts(state, num_experts=E)
    assert {name: tensor.device.type for name, tensor in stacked.items()} == {
        "experts.gate_up_proj": "meta",
        "experts.down_proj": "meta",
    }
    assert list(unstack_experts(stacked)) == list(state)


def test_what_comes_apart_can_be_saved(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    state = unstack_experts(stack_experts(one_by_one(LLAMA, bias=True), num_experts=E))
    safetensors.save_file(state, tmp_path / "experts.safetensors")
    assert same_bits(dict(sorted(safetensors.load_file(tmp_path / "experts.safetensors").items())),
                     dict(sorted(state.items())))  # fmt: skip


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, I), nn.Linear(H, I)
        self.down_proj = nn.Linear(I, H)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        down: Tensor = self.down_proj(gated)
        return down


def test_a_loop_over_modules_computes_the_same_as_experts() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        modules = nn.ModuleDict({"experts": nn.ModuleList(_Expert() for _ in range(E))})
        layer = nn.ModuleDict({"experts": moe_nn.Experts(H, I, E, bias=True)})
    finally:
        torch.set_default_dtype(torch.float32)
    layer.load_state_dict(stack_experts(modules.state_dict(), num_experts=E))
    x, weights = drawn(7, H, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    indices = torch.randint(0, E, (7, 2))
    expected = torch.zeros_like(x)
    for t in range(7):
        for j in range(2):
            expert = modules["experts"][int(indices[t, j])]  # type: ignore[index]
            expected[t] += weights[t, j] * expert(x[t])
    torch.testing.assert_close(layer["experts"](x, indices, weights), expected)
    modules.load_state_dict(unstack_experts(layer.state_dict()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts.2.w1.weight": None}, r"experts\.2\.w1\.weight must be there, got none"),
        ({"experts.3.w1.weight": (I, H)},
         r"experts\.3\.w1\.weight must be of an expert in \[0, 3\)"),
        ({"experts.1.w2.weight": (H, I + 1)},
         r"experts\.1\.w2\.weight must have the shape of expert 0 \(\[4, 6\]\), got \[4, 7\]"),
        ({"experts.0.w3.bias": (I,)}, r"experts\.0\.w1\.bias must be there, got none"),
        ({"experts.1.w3.bias": (I,)}, r"experts\.1\.w3\.bias must have no bias beside others"),
        ({"experts.1.w4.weight": (I, H)},
         r"the experts of experts must have the projections .*, got w1, w2, w3, w4"),
        ({"experts.gate_up_proj": (E, 2 * I, H)}, r"state must have experts in one form, got "
                                                  r"experts\.gate_up_proj and experts one by one"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    state = one_by_one(MIXTRAL)
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = drawn(*shape)
    with pytest.raises(ValueError, match=f"^stack_experts: {message}"):
        stack_experts(state, num_experts=E)


def test_a_type_or_size_that_does_not_fit_is_named() -> None:
    state = one_by_one(LLAMA)
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj\.weight must have the dtype of exp"):
        stack_experts(state | {"experts.1.up_proj.weight": drawn(I, H).half()}, num_experts=E)
    narrow = {f"experts.{e}.gate_proj.weight": drawn(I - 1, H) for e in range(E)}
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight must be \[6, 4\] to fit "):
        stack_experts(state | narrow, num_experts=E)


def test_the_number_of_experts() -> None:
    state = one_by_one(LLAMA)
    with pytest.raises(ValueError, match=r"experts\.3\.gate_proj\.weight must be there, got none"):
        stack_experts(state, num_experts=E + 1)
    with pytest.raises(ValueError, match=r"^stack_experts: num_experts must be .*, got 0"):
        stack_experts(state, num_experts=0)
    with pytest.raises(TypeError, match=r"^stack_experts: num_experts must be an int, got "):
        stack_experts(state, num_experts=2.0)  # type: ignore[arg-type]


def test_another_name_of_the_list() -> None:
    state = one_by_one(LLAMA, "block.ffn.local_experts.")
    assert stack_experts(state, num_experts=E) == state
    stacked = stack_experts(state, num_experts=E, experts="local_experts")
    assert list(stacked) == [
        "block.ffn.local_experts.gate_up_proj",
        "block.ffn.local_experts.down_proj",
    ]
    assert same_bits(unstack_experts(stacked, experts="local_experts"), state)


@pytest.mark.parametrize(
    ("state", "names", "message"),
    [
        ({"experts.gate_up_proj": (E, 2 * I, H)}, LLAMA,
         r"experts must have down_proj and either gate_up_proj or up_proj, got gate_up_proj"),
        ({"experts.gate_up_proj": (E, 2 * I, H), "experts.down_proj": (E, H, I)}, PLAIN[0],
         r"names must be three for experts\.gate_up_proj, got \['up_proj', 'down_proj'\]"),
        ({"experts.gate_up_proj": (E, I, H), "experts.down_proj": (E, H, I)}, LLAMA,
         r"experts\.gate_up_proj must be \[3, 12, 4\], got shape \[3, 6, 4\]"),
        ({"experts.up_proj": (E, I, H), "experts.down_proj": (E, H, I),
          "experts.gate_up_proj_bias": (E, I)}, LLAMA,
         r"experts\.gate_up_proj_bias must not be beside up_proj"),
        ({}, ("w1", "w1", "w2"), r"names must be two or three different names"),
    ],
)  # fmt: skip
def test_what_cannot_be_unstacked_is_named(
    state: dict[str, tuple[int, ...]], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^unstack_experts: {message}"):
        unstack_experts({name: drawn(*shape) for name, shape in state.items()}, names=names)


def test_names_are_names() -> None:
    with pytest.raises(TypeError, match=r"^unstack_experts: names must be two or three names, got"):
        unstack_experts({}, names="w1")
