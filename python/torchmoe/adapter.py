"""How a layer from another library is read: where its output, routing, loss and parts are.

Such a layer returns y alone, y with a loss, y with its logits, or a record, and keeps the rest in
attributes. `Adapter` finds what can be recognised; you tell it the rest. It is the only way in
which this package reads layers that are not its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchmoe._checks import check_at_least, check_flag, check_module, shown
from torchmoe._layer_results import (
    INDICES,
    LOGITS,
    WEIGHTS,
    fields_of,
    first_named,
    flattened,
    is_scalar,
    is_vector,
    is_whole,
    sort_out,
)

Source = str | Callable[[nn.Module, Any], Tensor | None]

_HIDDEN_STATES = ("hidden_states", "last_hidden_state", "output", "y")
_AUX_LOSS = ("aux_loss", "l_aux", "balance_loss", "load_balancing_loss", "router_loss", "loss")

_ROUTER = ("router", "gate", "wg", "gating", "gate_proj", "router_gate")
_EXPERTS = ("experts", "expert", "mlp_experts", "local_experts")
_SHARED = (
    "shared_experts",
    "shared_expert",
    "shared_mlp",
    "shared",
)
_SHARED_GATE = ("shared_expert_gate", "shared_gate")
_MASK = ("token_mask", "mask", "attention_mask", "padding_mask")

_HIDDEN_SIZE = ("hidden_size", "hidden_dim", "hidden", "d_model", "embed_dim", "dim", "in_features")
_NUM_EXPERTS = (
    "num_experts",
    "n_experts",
    "num_local_experts",
    "n_routed_experts",
    "experts_count",
)
_TOP_K = ("top_k", "k", "num_experts_per_tok", "topk", "num_selected")


class Reading(NamedTuple):
    """What was read of one call of a layer; T counts the flattened tokens."""

    hidden_states: Tensor
    """y, in x's shape."""
    aux_loss: Tensor | None
    """A scalar to add to the task loss, coefficient included; None if none is found."""
    logits: Tensor | None
    """[T, E], part of the graph if the layer returns them so."""
    indices: Tensor | None
    """[T, K] integers; an id outside [0, E) is a slot that is not routed."""
    weights: Tensor | None
    """[T, K], part of the graph if the layer returns them so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Describes a layer where it cannot be recognised; every field may be left out.

    The source of a tensor is a name, which is looked up in the layer's result and then among its
    attributes (with dots for attributes of submodules), or a function (layer, result) -> tensor or
    None. A part is the path of a submodule. Fields left out are guessed from common names:

        Adapter()                                     # aux_loss, router, gate, experts, ...
        Adapter(aux_loss="gate.balance")              # an attribute that is set by a call
        Adapter(logits=lambda layer, result: result[2])
        Adapter(token_mask="valid", per_token=False)

    Args:
        hidden_states: source of y; by default the result, its field of that name, or its first
            tensor.
        aux_loss: source of the auxiliary loss, a scalar with its coefficient.
        logits: source of the router's logits, [T, E].
        indices: source of the chosen ids, [T, K].
        weights: source of the slots' weights, [T, K].
        router: path of the router.
        experts: path of the experts.
        shared_experts: path of the experts that serve every token in addition to these.
        token_mask: the keyword by which forward takes a bool mask of x's leading dimensions.
            certify finds out by trial whether True or False means that the token counts.
        hidden_size: H.
        num_experts: E.
        top_k: K.
        per_token: whether in evaluation a token's output depends on that token alone. False for a
            layer with a capacity, one decision per sequence, or experts that choose their tokens.
        balances: whether the auxiliary loss evens out the load; False for a z-loss or a sparsity
            penalty alone.
        without_gradient: names of parameters, or prefixes of names, to which the layer gives no
            gradient on purpose, such as those of idle experts that it skips.
        reference: (layer, x) -> what layer(x) must return, y or (y, loss), computed in a slow and
            plain way from the layer's own parameters, with autograd's ordinary gradient.
        surrogate: (layer, x) -> y or (y, loss) whose ordinary gradient, with loss added at a factor
            of 1, is the gradient that the layer declares; by default the layer's method
            `surrogate(x)`.
        update: (layer) -> None, what a training loop calls after the optimizer's step; by default
            the layer's method `update_bias()`, if it has one.

    Raises:
        TypeError: a field has another type.
        ValueError: a size is below 1.
    """

    hidden_states: Source | None = None
    aux_loss: Source | None = None
    logits: Source | None = None
    indices: Source | None = None
    weights: Source | None = None
    router: str | None = None
    experts: str | None = None
    shared_experts: str | None = None
    token_mask: str | None = None
    hidden_size: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    per_token: bool | None = None
    balances: bool = True
    without_gradient: tuple[str, ...] = ()
    reference: Callable[[nn.Module, Tensor], Any] | None = None
    surrogate: Callable[[nn.Module, Tensor], Any] | None = None
    update: Callable[[nn.Module], None] | None = None

    def __post_init__(self) -> None:
        for name in ("hidden_states", "aux_loss", "logits", "indices", "weights"):
            source = getattr(self, name)
            if source is not None and not isinstance(source, str) and not callable(source):
                raise TypeError(
                    f"Adapter: {name} must be a name or a function, got {shown(source)}"
                )
        for name in ("router", "experts", "shared_experts", "token_mask"):
            path = getattr(self, name)
            if path is not None and not isinstance(path, str):
                raise TypeError(f"Adapter: {name} must be a string, got {shown(path)}")
        for name in ("hidden_size", "num_experts", "top_k"):
            if getattr(self, name) is not None:
                check_at_least("Adapter", name, getattr(self, name), 1)
        check_flag("Adapter", "balances", self.balances)
        if self.per_token is not None:
            check_flag("Adapter", "per_token", self.per_token)
        for name in ("reference", "surrogate", "update"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"Adapter: {name} must be a function, got {shown(function)}")
        names = self.without_gradient
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"Adapter: without_gradient must be a tuple of strings, got {shown(names)}"
            )

    def call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Reading:  # noqa: ANN401
        """Calls the layer and reads its result.

        Args:
            layer: any mixture-of-experts module.
            *args: passed to its forward.
            **kwargs: passed to its forward.

        Returns:
            What was found; None for what was not.

        Raises:
            TypeError: layer is not a module, or nothing in the result is a floating-point tensor.
        """
        check_module("Adapter.call", "layer", layer)
        routed: list[Any] = []
        path = self.router_path(layer)
        router = layer.get_submodule(path) if path else None
        if router is None:
            return self.read(layer, layer(*args, **kwargs))
        handle = router.register_forward_hook(lambda module, inputs, output: routed.append(output))
        try:
            result = layer(*args, **kwargs)
        finally:
            handle.remove()
        # Each of several calls has seen only some of the tokens.
        return self.read(layer, result, routed[0] if len(routed) == 1 else None)

    def read(self, layer: nn.Module, result: Any, routed: Any = None) -> Reading:  # noqa: ANN401
        """Reads what a call returned.

        Args:
            layer: the module that was called.
            result: what it returned.
            routed: what its router returned in that call, if that is known.

        Returns:
            As `call`.

        Raises:
            TypeError: nothing in the result is a floating-point tensor.
            ValueError: the name given as a source is neither in the result nor an attribute.
        """
        named, loose = fields_of(result)
        y = _told(self.hidden_states, layer, result)
        if self.hidden_states is None:
            y = next((named[name] for name in _HIDDEN_STATES if is_vector(named.get(name))), None)
        if y is None and self.hidden_states is None:
            y = next((value for value in [*loose, *named.values()] if is_vector(value)), None)
        if not isinstance(y, Tensor):
            raise TypeError(
                "Adapter: hidden_states must be found in what the layer returns, got "
                f"{shown(result)}"
            )
        rest = [value for value in loose if isinstance(value, Tensor) and value is not y]
        experts = self.expert_count(layer)
        found = {
            "aux_loss": first_named(named, _AUX_LOSS, is_scalar),
            "logits": first_named(named, LOGITS, is_vector),
            "indices": first_named(named, INDICES, is_whole),
            "weights": first_named(named, WEIGHTS, is_vector),
        }
        routed_fields = fields_of(routed)
        for fields in ((named, rest), routed_fields):
            sort_out(found, fields, experts)
        if found["aux_loss"] is None:
            found["aux_loss"] = next((value for value in rest if is_scalar(value)), None)
        if found["aux_loss"] is None:
            found["aux_loss"] = self._kept_loss(layer)
        for name in found:
            if getattr(self, name) is not None:
                found[name] = _told(getattr(self, name), layer, result)
        return Reading(y, **{name: flattened(value) for name, value in found.items()})

    def check(self, layer: nn.Module) -> None:
        """Raises unless the layer has the parts that are named.

        Raises:
            ValueError: it does not.
        """
        for name in ("router", "experts", "shared_experts"):
            path = getattr(self, name)
            if path is None:
                continue
            try:
                layer.get_submodule(path)
            except AttributeError:
                raise ValueError(
                    f"Adapter: {name} must be the path of a part of {type(layer).__name__}, got "
                    f"{path!r}"
                ) from None

    def router_path(self, layer: nn.Module) -> str | None:
        """The path of the router, None if none is found."""
        return self.router if self.router is not None else _part(layer, _ROUTER)

    def experts_path(self, layer: nn.Module) -> str | None:
        """The path of the experts, None if none are found."""
        return self.experts if self.experts is not None else _part(layer, _EXPERTS)

    def shared_path(self, layer: nn.Module) -> str | None:
        """The path of the experts that serve every token, None if none are found."""
        return self.shared_experts if self.shared_experts is not None else _part(layer, _SHARED)

    def role(self, layer: nn.Module, name: str) -> str:
        """Which part a parameter or buffer of the layer belongs to, by its name.

        Returns:
            "router", "experts", "shared experts" or "layer".
        """
        if self.shared_experts is not None:
            shared = _within(name, self.shared_experts)
        else:
            shared = not {*_SHARED, *_SHARED_GATE}.isdisjoint(name.split("."))
        if shared:
            return "shared experts"
        experts, router = self.experts_path(layer), self.router_path(layer)
        if experts is not None and _within(name, experts):
            return "experts"
        if router is not None and _within(name, router):
            return "router"
        if "." not in name and self._counts_experts(layer, name):
            return "experts"
        return "layer"

    def size(self, layer: nn.Module) -> int | None:
        """H, None if it is not found."""
        if self.hidden_size is not None:
            return self.hidden_size
        weight = self.router_weight(layer)
        seen = _number(layer, _HIDDEN_SIZE)
        if seen is None and weight is not None:
            seen = dict(layer.named_parameters())[weight].shape[-1]
        return seen

    def expert_count(self, layer: nn.Module) -> int | None:
        """E, None if it is not found."""
        if self.num_experts is not None:
            return self.num_experts
        seen = _number(layer, _NUM_EXPERTS)
        path = self.experts_path(layer)
        if seen is None and path is not None:
            experts = layer.get_submodule(path)
            if isinstance(experts, nn.ModuleList):
                return len(experts)
        weight = self.router_weight(layer)
        if seen is None and weight is not None:
            seen = dict(layer.named_parameters())[weight].shape[0]
        return seen

    def slots(self, layer: nn.Module) -> int | None:
        """K, None if it is not found."""
        return self.top_k if self.top_k is not None else _number(layer, _TOP_K)

    def router_weight(self, layer: nn.Module) -> str | None:
        """The name of the router's matrix, [E, H]; None if there is not exactly one."""
        path = self.router_path(layer)
        if path is None:
            return None
        matrices = [
            name
            for name, parameter in layer.named_parameters()
            if _within(name, path) and parameter.dim() == 2
        ]
        return matrices[0] if len(matrices) == 1 else None

    def mask_names(self, layer: nn.Module) -> Iterator[str]:
        """The keywords of forward that may be a mask of tokens."""
        if self.token_mask is not None:
            yield self.token_mask
            return
        names = layer.forward.__code__.co_varnames if hasattr(layer.forward, "__code__") else ()
        yield from (name for name in _MASK if name in names)

    def _counts_experts(self, layer: nn.Module, name: str) -> bool:
        """Whether a tensor of the layer itself has a matrix for each expert."""
        tensor = getattr(layer, name, None)
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            return False
        return tensor.shape[0] == self.expert_count(layer)

    def _kept_loss(self, layer: nn.Module) -> Tensor | None:
        """A loss that the layer or its router keeps as an attribute."""
        path = self.router_path(layer)
        owners = [layer] if path is None else [layer, layer.get_submodule(path)]
        for owner in owners:
            for name in _AUX_LOSS:
                value = vars(owner).get(name)
                if is_scalar(value):
                    return value
        return None


def _told(source: Source | None, layer: nn.Module, result: Any) -> Tensor | None:  # noqa: ANN401
    """The tensor from a source that the user has given."""
    if source is None:
        return None
    if not isinstance(source, str):
        return source(layer, result)
    named, _ = fields_of(result)
    if source in named:
        value: Any = named[source]
    else:
        value = layer
        for part in source.split("."):
            if not hasattr(value, part):
                raise ValueError(
                    f"Adapter: {source!r} must be a field of what {type(layer).__name__} returns "
                    "or an attribute of it"
                )
            value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def _part(layer: nn.Module, names: tuple[str, ...]) -> str | None:
    """The nearest submodule with one of the names, the layer's own before those of its parts."""
    children = dict(layer.named_children())
    for name in names:
        if name in children:
            return name
    experts = [name for name in children if name in _EXPERTS]
    for child, module in children.items():
        if child in (*experts, *_SHARED, *_SHARED_GATE) or isinstance(module, nn.ModuleList):
            continue
        inner = _part(module, names)
        if inner is not None:
            return f"{child}.{inner}"
    return None


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _number(layer: nn.Module, names: tuple[str, ...]) -> int | None:
    """An int among the attributes of the layer, its parts or their configuration."""
    for owner in layer.modules():
        for holder in (owner, getattr(owner, "config", None)):
            for name in names:
                value = getattr(holder, name, None) if holder is not None else None
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
    return None
