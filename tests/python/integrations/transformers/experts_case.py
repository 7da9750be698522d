"""Small modules of transformers' experts, and what they and our function give for one input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import torchmoe.integrations.transformers
from torchmoe.integrations.transformers.catalogue import ExpertsClass, experts_classes, small

OURS = "torchmoe"
T, K, E, H, I = 9, 3, 5, 12, 10  # noqa: E741  the glossary's letters
SIZES = {"num_experts": E, "hidden_size": H, "intermediate_size": I}

# Their eager forward refuses the sentinel E: two count ids with one_hot(num_classes=E), one reads
# the matrices of every id that it counts.
WITHOUT_SENTINEL = {"GptOssExperts", "OpenAIPrivacyFilterExperts", "NemotronHExperts"}

CLASSES = experts_classes()

torchmoe.integrations.transformers.register()


class Inputs(NamedTuple):
    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


def class_named(name: str) -> ExpertsClass:
    (found,) = [experts for experts in CLASSES if experts.name == name]
    return found


def module_of(experts: ExpertsClass | str, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
    """A small module whose pre-activations are of order 4, so that some are beyond the limits."""
    if isinstance(experts, str):
        experts = class_named(experts)
    module = small(experts, **(SIZES | sizes))
    for name, parameter in module.named_parameters():
        std = {"gate_up_proj": H**-0.5, "up_proj": H**-0.5, "down_proj": I**-0.5}.get(name, 1.0)
        nn.init.normal_(parameter, std=std)
    return module.to(dtype)


def inputs_of(module: Any) -> Inputs:
    """One token has an expert twice, expert 3 is idle, and some slots are not routed."""
    dtype = module.down_proj.dtype
    x = 4 * torch.randn(T, H, dtype=torch.float64)
    while (near := _near_a_limit(module, x.to(dtype))).any():
        x[near] = 4 * torch.randn(T, H, dtype=torch.float64)[near]
    indices = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (T, K))]
    indices[0] = torch.tensor([1, 1, 2])
    indices[1, 0] = indices[2] = indices[3, 1:] = E
    weights = torch.rand(T, K, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(x.to(dtype), indices, weights.to(wide))


def _near_a_limit(module: Any, x: Tensor) -> Tensor:
    """[T] bool: tokens with a pre-activation so near that rounding it changes the gradient."""
    limit = getattr(module, "limit", getattr(module, "swiglu_limit", None))
    if limit is None:
        return torch.zeros(T, dtype=torch.bool)
    w_in = module.gate_up_proj.detach().double()
    w_in = w_in.mT if module.is_transposed else w_in
    rows = torch.einsum("th,eih->tei", x.double(), w_in)
    if module.has_bias:
        rows += module.gate_up_proj_bias.detach().double()
    # A pre-activation of bfloat16 is off by half of its eps, 2^-8, and by the rounding of its sum.
    return ((rows.abs() / limit - 1).abs() < 0.01).any(dim=2).any(dim=1)


def step(module: Any, inputs: Inputs, implementation: str) -> dict[str, Tensor]:
    """The output, and the gradients of <y, direction> by name."""
    module = deepcopy(module)
    module.config._experts_implementation = implementation
    x, weights = (t.detach().clone().requires_grad_() for t in (inputs[0], inputs[2]))
    indices, used = inputs.top_k_index, weights
    if implementation == "eager" and type(module).__name__ in WITHOUT_SENTINEL:
        routed = indices < E
        indices, used = indices.where(routed, 0), weights.where(routed, 0)
    y = module(x, indices, used)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype)
    (y * direction).sum().backward()
    found = {"y": y, "hidden_states": x.grad, "top_k_weights": weights.grad}
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(isinstance(tensor, Tensor) for tensor in found.values())
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


class _Wide(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """What a class computes in float32 whatever it is given is computed in float64."""
    with _Wide():
        yield


def exact(module: Any, inputs: Inputs) -> dict[str, Tensor]:
    """The class's own result and gradients in float64, for the same values."""
    wide = Inputs(inputs[0].double(), inputs[1], inputs[2].double())
    with widened():
        return step(deepcopy(module).double(), wide, "eager")
