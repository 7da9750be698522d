"""How transformers is told of our function, and what that is given: models, refusals, modes."""

from __future__ import annotations

import io
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers")

from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from integrations.transformers.experts_case import (
    CLASSES,
    OURS,
    E,
    H,
    Inputs,
    inputs_of,
    module_of,
    step,
)
from torchmoe.integrations.transformers import __main__, register, supported
from torchmoe.integrations.transformers.experts import experts_forward


def tiny_config(**settings: Any) -> MixtralConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4, "vocab_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralConfig(**(sizes | heads | settings))


# --- registration ---------------------------------------------------------------------------------


def test_models_take_the_name() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(), experts_implementation=OURS)
    assert model.config._experts_implementation == OURS
    tokens = torch.arange(10)[None]
    ours = model(tokens).logits
    model.set_experts_implementation("eager")
    eager = model(tokens).logits
    assert not torch.equal(ours, eager)  # or the same code has run twice
    torch.testing.assert_close(ours, eager)
    model.set_experts_implementation(OURS)
    assert torch.equal(model(tokens).logits, ours)


def test_from_pretrained(tmp_path: Any) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(), experts_implementation=OURS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=OURS)
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_registering_again_changes_nothing() -> None:
    register()
    register(OURS)
    assert ALL_EXPERTS_FUNCTIONS[OURS] is experts_forward


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "batched_mm", "deepgemm_megamoe", ""])
def test_a_name_of_transformers_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^register: name must be none that .*, got '" + name):
        register(name)
    assert ALL_EXPERTS_FUNCTIONS.get(name) is not experts_forward


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^register: name must be a string, got 3"):
        register(3)  # type: ignore[arg-type]


# --- refusals -------------------------------------------------------------------------------------


def refusal(module: Any) -> str:
    """What a call says, which is what supported says."""
    inputs = inputs_of(module_of("MixtralExperts"))
    with pytest.raises(ValueError, match=r"^torchmoe: experts must be .*, got ") as error:
        experts_forward(module, *inputs)
    answer, _, why = supported(module).partition(": ")
    assert answer == "eager"
    assert f"got {why}; choose experts_implementation=" in str(error.value)
    return why


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    module = module_of("MixtralExperts")
    weight = module.down_proj.detach().to(dtype)
    module.down_proj = nn.Parameter(weight, requires_grad=False)
    assert refusal(module) == f"MixtralExperts whose down_proj is quantised to {dtype}"


def test_weights_with_scales_are_refused() -> None:
    module = module_of("MixtralExperts")
    module.register_buffer("gate_up_proj_scale_inv", torch.ones(E))
    assert "MixtralExperts with gate_up_proj_scale_inv in addition" in refusal(module)


def test_experts_of_8_bit_floats_are_refused_by_their_own_interface() -> None:
    assert ALL_FP8_EXPERTS_FUNCTIONS[OURS] is experts_forward
    with torch.device("meta"):
        module = FP8Experts(tiny_config(), block_size=(8, 8))
    assert supported(module).startswith("eager: FP8Experts")


def test_expert_parallelism_is_refused() -> None:
    module = module_of("MixtralExperts")
    module._is_expert_parallel = True
    assert refusal(module) == "MixtralExperts split among processes by expert parallelism"


def test_a_tensor_of_several_tensors_is_refused() -> None:
    class DTensor(torch.Tensor):
        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return [], None

    module = module_of("MixtralExperts")
    module._parameters["gate_up_proj"] = module.gate_up_proj.detach().as_subclass(DTensor)
    assert refusal(module) == "MixtralExperts whose gate_up_proj is a DTensor"


def test_other_modules_are_refused() -> None:
    assert (
        refusal(nn.Linear(2, 2)) == "Linear, which is no class of transformers' experts interface"
    )
    with pytest.raises(TypeError, match=r"^supported: experts must be .*, got 3"):
        supported(3)  # type: ignore[arg-type]


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GptOssExperts", "MuseSparkExperts"])
def test_zero_tokens(name: str) -> None:
    module = module_of(name)
    nothing = Inputs(*(tensor[:0] for tensor in inputs_of(module)))
    found = step(module, nothing, OURS)
    assert found["y"].shape == (0, H)
    assert all(tensor.count_nonzero() == 0 for tensor in found.values())


@pytest.mark.parametrize("name", ["MixtralExperts", "MuseSparkExperts"])
def test_leading_dimensions_and_narrow_weights_and_ids(name: str) -> None:
    module = module_of(name, torch.bfloat16)
    x, indices, weights = inputs_of(module)
    module.config._experts_implementation = OURS
    expected = module(x, indices, weights.half())
    assert expected.dtype == torch.bfloat16
    assert torch.equal(expected, module(x, indices, weights.half().float()))
    y = module(x.unflatten(0, (3, 3)), indices.int(), weights.half())
    assert torch.equal(y, expected.unflatten(0, (3, 3)))


@pytest.mark.parametrize("name", ["MixtralExperts", "MuseSparkExperts"])
def test_autocast_returns_the_type_of_the_tokens(name: str) -> None:
    module = module_of(name, torch.float32)
    x, indices, weights = inputs_of(module)
    module.config._experts_implementation = OURS
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, indices, weights.bfloat16())
    assert y.dtype == torch.float32
    assert not torch.equal(y, module(x, indices, weights.bfloat16()))


def test_nothing_is_kept_in_the_module() -> None:
    module = module_of("GptOssExperts")
    before, names = module.state_dict(), set(vars(module))
    inputs = inputs_of(module)
    expected = step(module, inputs, OURS)
    module.config._experts_implementation = OURS
    y = module(*inputs)
    assert torch.equal(y, expected["y"])
    assert list(module.state_dict()) == list(before)
    assert set(vars(module)) == names
    assert torch.equal(deepcopy(module)(*inputs), y)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*inputs), y)


def test_compiles_as_one_graph() -> None:
    module = module_of("GptOssExperts", torch.float32)
    module.config._experts_implementation = OURS
    inputs = inputs_of(module)
    compiled = torch.compile(lambda m, *given: m(*given), fullgraph=True, backend="aot_eager")
    y = compiled(module, *inputs)
    y.sum().backward()
    gradient, module.gate_up_proj.grad = module.gate_up_proj.grad, None
    expected = module(*inputs)
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(gradient, module.gate_up_proj.grad)
    with torch.compiler.set_stance("fail_on_recompile"):  # the same graph serves every layer
        other = deepcopy(module)
        assert torch.equal(compiled(other, *inputs), expected)
    for limit in (1.5, 3.0):
        module.limit = limit
        changed = module(*inputs)
        assert torch.equal(compiled(module, *inputs), changed)
        assert not torch.equal(changed, expected)


# --- what is there --------------------------------------------------------------------------------


def test_the_command_lists_every_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert f"{len(CLASSES)} classes, " in first
    assert "eager" not in first
    assert [row.split()[:2] for row in rows] == [[c.package, c.name] for c in CLASSES]
    assert {row.split()[2] for row in rows} == {"fused", "composed"}


def test_the_package_does_not_import_transformers() -> None:
    code = "import sys, torchmoe; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
