"""The C++ layer and the Python layer give the same bits, with their state carried across both ways.

The C++ side is the program tests/cpp/nn/parity.cpp: a request goes to it as a dict of tensors and
settings, and its outputs, routing, losses, gradients and state come back, step by step.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpp_layers import (
    ASSISTANCE,
    BALANCE,
    EXPERTS,
    HIDDEN,
    ROUTER,
    SETTINGS,
    SHARED,
    drawn_settings,
    layer_of,
    wrong_settings,
)
from float_types import FLOATS
from torchmoe.nn import Routing, WithAttachedLoss

pytestmark = pytest.mark.needs_build

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "build" / "tests" / "cpp" / "torchmoe_parity"
#: The random configurations, a batch of them in each test.
BATCHES, BATCH = 12, 25
STEPS = 2


def request_of(
    settings: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32, length: int = 13
) -> dict[str, Any]:
    """A case of the program, whose parameters it draws itself."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, HIDDEN, generator=generator).to(dtype)

    def batch(rows: int) -> dict[str, Any]:
        masked = torch.rand(1, generator=generator).item() < 0.4
        mask = torch.rand(rows, length, generator=generator) < 0.7 if masked else None
        return {"x": random(rows, length), "grad": random(rows, length), "token_mask": mask}

    return {
        "config": settings,
        "dtype": torch.empty(0, dtype=dtype),
        "state": None,
        "files": None,
        "steps": [[batch(1 + micro) for micro in range(1 + step)] for step in range(STEPS)],
        "seed": seed,
    }


def put_output(result: dict[str, Any], prefix: str, output: Any) -> None:
    """The tensors of an output by name."""
    fields = ("logits", "weights", "selected", "indices", "tokens_per_expert", "kept_per_expert")
    named = {name: getattr(output.routing, name) for name in fields}
    named |= {f"losses.{name}": loss for name, loss in output.routing.losses.items()}
    named |= {"hidden_states": output.hidden_states, "aux_loss": output.aux_loss}
    result.update({prefix + name: value.detach().clone() for name, value in named.items()})


def run_python(request: dict[str, Any]) -> dict[str, Any]:
    """What parity.cpp does, in Python: a case's results, or its error."""
    try:
        return _run_python(request)
    except (RuntimeError, ValueError, TypeError) as error:
        return {"error": str(error)}


def _run_python(request: dict[str, Any]) -> dict[str, Any]:
    settings, seed = request["config"], request["seed"]
    torch.manual_seed(seed)
    layer = layer_of(settings).to(request["dtype"].dtype)
    if request["state"] is not None:
        layer.load_state_dict(request["state"])
    result: dict[str, Any] = {}
    result |= {f"first.{name}": value.clone() for name, value in layer.state_dict().items()}
    attached = WithAttachedLoss(layer, scale=0.5)
    seen: list[Any] = []
    layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
    torch.manual_seed(seed)
    for s, step in enumerate(request["steps"]):
        routings: list[Routing] = []
        earlier = None
        layer.zero_grad()
        for b, batch in enumerate(step):
            x = batch["x"].clone().requires_grad_()
            given = {"token_mask": batch["token_mask"], "earlier_counts": earlier}
            if settings["attached"]:
                attached(x, **given).backward(batch["grad"])
            else:
                output = layer(x, **given)
                torch.autograd.backward(output[:2], [batch["grad"], None])
            routings.append(seen[-1].routing)
            prefix = f"step{s}.batch{b}."
            put_output(result, prefix, seen[-1])
            result[prefix + "gradients.x"] = x.grad
            if settings["earlier_counts"]:
                counts = routings[-1].tokens_per_expert
                earlier = counts if earlier is None else earlier + counts
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if parameter.grad is not None:
                    result[f"step{s}.gradients.{name}"] = parameter.grad.clone()
                    parameter.sub_(0.125 * parameter.grad)
        layer.update(routings)
    layer.eval()
    with torch.no_grad():
        put_output(result, "eval.", layer(request["steps"][-1][-1]["x"]))
    result |= {f"state.{name}": value.clone() for name, value in layer.state_dict().items()}
    return result


def run_cpp(
    requests: Sequence[dict[str, Any]], folder: Path, threads: int = 1
) -> list[dict[str, Any]]:
    """The program's answer to several cases."""
    if not PROGRAM.exists():
        pytest.fail(f"{PROGRAM} is missing: make build-tests")
    cases = [request | {"config": _with_tensors(request["config"])} for request in requests]
    given = {"threads": threads, "cases": cases}
    torch.save(given, folder / "request.pt")
    done = subprocess.run(
        [PROGRAM, folder / "request.pt", folder / "result.pt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # LibTorch writes the dict's type next to it, which the restricted reader does not know.
    loaded: dict[str, Tensor] = torch.load(folder / "result.pt", weights_only=False)
    results: list[dict[str, Any]] = [{} for _ in requests]
    for name, value in loaded.items():
        case, _, rest = name.partition(".")
        results[int(case)][rest] = value
    for result in results:
        if "error" in result:
            message = bytes(result["error"].tolist()).decode()
            result.clear()
            result["error"] = message
    return results


def _with_tensors(settings: dict[str, Any]) -> dict[str, Any]:
    """Lists as tensors, of which the program knows the type also where they are empty."""
    converted = dict(settings)
    for name, value in settings.items():
        if isinstance(value, dict):
            converted[name] = _with_tensors(value)
        elif isinstance(value, list):
            converted[name] = torch.tensor(value, dtype=torch.int64)
    return converted


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    """All that a tensor is; unlike ==, tells 0 from -0."""
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def in_cpp(message: str) -> str:
    """A message with types as C++ prints them."""
    return message.replace("torch.int64", "Long")


def differing(actual: dict[str, Any], expected: dict[str, Any]) -> Iterable[str]:
    """What differs between two results, in the order of the run."""
    if "error" in actual or "error" in expected:
        messages = [in_cpp(str(result.get("error"))) for result in (actual, expected)]
        return [] if messages[0] == messages[1] else [f"{messages[0]} | {messages[1]}"]
    if actual.keys() != expected.keys():
        return sorted(actual.keys() ^ expected.keys())
    return [name for name in expected if bits(actual[name]) != bits(expected[name])]


def with_state_of(request: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The same case, starting from what the other layer ended with."""
    state = {
        name.removeprefix("state."): value
        for name, value in result.items()
        if name.startswith("state.")
    }
    return request | {"state": state, "seed": request["seed"] + 1}


def assert_same_both_ways(requests: Sequence[dict[str, Any]], folder: Path) -> int:
    """Compares every case, then goes on in C++ from Python's state and in Python from C++'s.

    Returns:
        how many cases could be run.
    """
    expected = [run_python(request) for request in requests]
    actual = run_cpp(requests, folder)
    wrong = {}
    for i, pair in enumerate(zip(actual, expected, strict=True)):
        if names := list(differing(*pair)):
            wrong[requests[i]["seed"]] = names[:6]
    assert not wrong
    runnable = [i for i, result in enumerate(expected) if "error" not in result]
    for i in runnable:
        assert all(value.isfinite().all() for value in expected[i].values())
    to_cpp = [with_state_of(requests[i], expected[i]) for i in runnable]
    to_python = [with_state_of(requests[i], actual[i]) for i in runnable]
    carried = run_cpp(to_cpp, folder)
    for i, one, other in zip(runnable, carried, map(run_python, to_python), strict=True):
        assert not list(differing(one, other)), requests[i]["seed"]
    return len(runnable)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_layers_give_the_same_bits(batch: int, tmp_path: Path) -> None:
    seeds = range(batch * BATCH, (batch + 1) * BATCH)
    requests = [
        request_of(drawn_settings(seed), seed, FLOATS[seed % len(FLOATS)]) for seed in seeds
    ]
    ran = assert_same_both_ways(requests, tmp_path)
    assert ran >= BATCH // 2


def test_many_tokens_on_more_threads_give_the_same_bits(tmp_path: Path) -> None:
    # A torch.nn.Linear as router has torch's product, which does depend on the threads.
    drawn = {seed: drawn_settings(seed) for seed in range(35)}
    requests = [
        request_of(settings, seed, FLOATS[seed % len(FLOATS)], length=700)
        for seed, settings in drawn.items()
        if not (settings["router"] or {}).get("linear")
    ]
    assert len(requests) >= 25
    expected = [run_python(request) for request in requests]
    actual = run_cpp(requests, tmp_path, threads=2)
    assert not [
        i for i, pair in enumerate(zip(actual, expected, strict=True)) if list(differing(*pair))
    ]


def test_most_random_layers_can_be_run() -> None:
    ran = 0
    for seed in range(BATCHES * BATCH):
        request = request_of(drawn_settings(seed), seed)
        request["steps"] = [request["steps"][0]]
        ran += "error" not in run_python(request)
    assert ran >= 200


def test_what_is_refused_is_refused_in_the_same_words(tmp_path: Path) -> None:
    requests = [request_of(settings, 1) for settings in wrong_settings().values()]
    for request in requests:
        request["steps"][0][0]["token_mask"] = None
    expected = [run_python(request) for request in requests]
    actual = run_cpp(requests, tmp_path)
    names = list(wrong_settings())
    assert not [name for name, result in zip(names, expected, strict=True) if "error" not in result]
    assert not {
        name: difference
        for name, pair in zip(names, zip(actual, expected, strict=True), strict=True)
        if (difference := list(differing(*pair)))
    }


def test_moved_state_is_moved(tmp_path: Path) -> None:
    settings = SETTINGS | {
        "balance": BALANCE | {"selection_bias_rate": 0.125, "fraction_from": "history"},
        "assistance": {
            "backup": [1, 2, 3, 4, 5, 0],
            "threshold": 1.0,
            "lower_threshold": 0.5,
            "patience": 1,
        },
        "router": ROUTER | {"usage_scaling": True},
    }
    (result,) = run_cpp([request_of(settings, 3)], tmp_path)
    for name in ("router.usage", "selection_bias", "assistance.assisted"):
        assert not torch.equal(result[f"first.{name}"], result[f"state.{name}"]), name
    assert result["state.router.usage"].sum().item() == pytest.approx(1)
    assert result["first.router.usage"].tolist() == pytest.approx([1 / EXPERTS] * EXPERTS)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_go_both_ways(suffix: str, tmp_path: Path) -> None:
    settings = wrong_settings()["no usage for history"] | {
        "router": ROUTER | {"bias": True, "track_usage": True},
        "bias": True,
        "activation": "gelu",
        "assistance": ASSISTANCE | {"patience": 1},
        "shared_experts": SHARED,
    }
    settings["balance"] = settings["balance"] | {"selection_bias_rate": 0.125}
    request = request_of(settings, 5, torch.bfloat16)
    torch.manual_seed(0)
    layer = layer_of(settings).to(torch.bfloat16)
    layer.update(layer(request["steps"][0][0]["x"]).routing)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    assert len(state) == 12
    files = {end: str(tmp_path / f"{end}.{suffix}") for end in ("read", "write")}
    if suffix == "pt":
        torch.save(layer.state_dict(), files["read"])
    else:
        save_file(state, files["read"])
    (result,) = run_cpp([request | {"files": files}], tmp_path)
    assert not list(
        differing(
            {name: value for name, value in result.items() if name.startswith("first.")},
            {f"first.{name}": value for name, value in state.items()},
        )
    )
    written = torch.load(files["write"]) if suffix == "pt" else load_file(files["write"])
    layer.load_state_dict(written)
    last = {name: value for name, value in result.items() if name.startswith("state.")}
    after = {f"state.{name}": value for name, value in layer.state_dict().items()}
    assert not list(differing(last, after))
    assert any(bits(after[f"state.{name}"]) != bits(value) for name, value in state.items())
