"""A layer under test: private copies of it, run on seeded tokens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchmoe.adapter import Adapter, Reading
from torchmoe.nn._layers import untrained_copy
from torchmoe.nn._sharding import refuse_sharded
from torchmoe.testing._detached_copies import DetachedCopies
from torchmoe.testing._observation import Observer, same_draws
from torchmoe.testing.certify.copies import gradients
from torchmoe.testing.certify.looking import COUNTING, Look
from torchmoe.testing.certify.own_layers import Sharing, declared_sharing, declared_surrogate
from torchmoe.testing.certify.shared_state import shared_by_default

#: T of the first question: above 9, and no other size of a layer.
NUM_TOKENS = 13
_ROUNDINGS = 16
#: In a 16-bit type, whose products are summed in float32: the longest chain between x and y has
#: four roundings besides those of the sums: gate and up, their product, the expert's output, the
#: weighted sum.
ROUNDINGS_16 = 8
#: Methods that move a selection bias after a step.
_UPDATES = ("update_bias", "update_expert_bias", "update_selection_bias")


class Mask(NamedTuple):
    """How a layer's forward takes the mask of tokens that count."""

    name: str
    """The keyword of forward."""
    true_counts: bool
    """Whether True is a token that counts."""


class Step(NamedTuple):
    """One forward and backward pass."""

    reading: Reading
    gradients: dict[str, Tensor | None]
    """Of "x" and of each parameter by its name."""

    @property
    def values(self) -> dict[str, Tensor | None]:
        """The values y and aux_loss by name."""
        return {"y": self.reading.hidden_states, "aux_loss": self.reading.aux_loss}

    @property
    def everything(self) -> dict[str, Tensor | None]:
        """The values, and the gradients as "d/d NAME"."""
        return self.values | {f"d/d {name}": grad for name, grad in self.gradients.items()}


class Subject:
    """The layer, copied, with what was found out about it.

    Args:
        layer: the user's, which is left as it is.
        adapter: how it is read.
        inputs: tokens to draw from, [..., H], or None for standard normal ones.
        hidden_size: H, or None where the layer tells.
        dtype: of the copies; their parameters keep the narrower types that they insist on.
        seed: of tokens, incoming gradients and draws.

    Raises:
        TypeError: the layer is sharded, or returns nothing that is an output.
        ValueError: hidden_size is not to be seen.
        RuntimeError: the layer takes tokens neither as [T, H] nor as [1, T, H].
    """

    def __init__(
        self,
        layer: nn.Module,
        adapter: Adapter,
        inputs: Tensor | None,
        hidden_size: int | None,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        refuse_sharded("certify", "layer", layer)
        adapter.check(layer)
        self.adapter, self.dtype, self.seed = adapter, dtype, seed
        self.shared = list(shared_by_default(layer))
        with DetachedCopies():
            self._template = untrained_copy(layer).to(dtype)
        for parameter in self._template.parameters():
            parameter.grad = None
        self.name = type(layer).__name__
        self._pool = None if inputs is None else inputs.detach().to(dtype).flatten(0, -2)
        seen = hidden_size or (inputs.shape[-1] if inputs is not None else None)
        seen = seen or adapter.size(self._template)
        if seen is None:
            raise ValueError(
                "certify: hidden_size must be given where the layer does not show it, got None"
            )
        self.hidden_size: int = seen
        self.num_experts = adapter.expert_count(self._template)
        self.top_k = adapter.slots(self._template)
        self.surrogate = adapter.surrogate or declared_surrogate(self._template)
        self.leading: tuple[int, ...] = ()
        self._find_leading_dimensions()
        self._find_out()

    # ---- Copies and tokens --------------------------------------------------------------------

    def fresh(self, *, training: bool | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """A new copy, in training unless said otherwise."""
        with DetachedCopies():
            layer = copy.deepcopy(self._template)
        layer = layer if dtype is None else layer.to(dtype)
        return layer.train(True if training is None else training)

    def steady(self) -> nn.Module:
        """A new copy in the mode in which it draws nothing."""
        return self.fresh(training=not self.draws)

    def tokens(self, number: int, stream: int = 0) -> Tensor:
        """Seeded tokens in the shape that the layer takes, [number, H] or [1, number, H]."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * stream)
        if self._pool is None:
            x = torch.randn(number, self.hidden_size, generator=generator, dtype=torch.float64)
        else:
            x = self._pool[torch.randint(len(self._pool), (number,), generator=generator)]
        return x.to(self.dtype).reshape(*self.leading, number, self.hidden_size)

    def shaped(self, tokens: Tensor) -> Tensor:
        """[n, H] in the shape that the layer takes."""
        return tokens.reshape(*self.leading, -1, self.hidden_size)

    def parts(self, x: Tensor, g: Tensor, number: int) -> list[tuple[Tensor, Tensor]]:
        """Tokens and their incoming gradients, cut into so many calls; none without tokens."""
        cut = (value.flatten(0, -2).tensor_split(number) for value in (x, g))
        return [
            (self.shaped(rows), self.shaped(arriving))
            for rows, arriving in zip(*cut, strict=True)
            if len(rows) > 0
        ]

    def incoming(self, like: Tensor, stream: int = 0) -> Tensor:
        """A seeded gradient for y, contiguous."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * stream + 7)
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return drawn.to(like.dtype)

    # ---- Passes -------------------------------------------------------------------------------

    def call(
        self, layer: nn.Module, x: Tensor, mask: Tensor | None = None, draw: int = 0
    ) -> Reading:
        """A forward pass; the same numbers are drawn in every one with the same `draw`.

        mask: of x's leading dimensions, True = the token counts, for layers that take one.
        """
        with same_draws(self.seed + draw, [x]):
            return self.adapter.call(layer, x, **self.masked(mask))

    def masked(self, mask: Tensor | None) -> dict[str, Tensor]:
        """The keyword argument that says which tokens count."""
        if mask is None:
            return {}
        assert self.mask is not None
        return {self.mask.name: mask if self.mask.true_counts else ~mask}

    def function(
        self, layer: nn.Module, mask: Tensor | None = None
    ) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        """The layer as a pure function of "x" and its parameters by name, to "y" and "aux_loss"."""
        called = _Called(self, layer, mask)
        state = {f"layer.{name}": buffer.clone() for name, buffer in layer.named_buffers()}

        def evaluate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            lent = {f"layer.{name}": t for name, t in tensors.items() if name != "x"}
            lent |= {name: buffer.clone() for name, buffer in state.items()}
            values: dict[str, Tensor] = torch.func.functional_call(called, lent, (tensors["x"],))
            return values

        return evaluate

    def point(self, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """What `function` takes: "x", and the parameters that require a gradient."""
        parameters = dict(layer.named_parameters())
        learned = {name: p.detach() for name, p in parameters.items() if p.requires_grad}
        return {"x": x.detach(), **learned}

    def step(
        self,
        layer: nn.Module,
        x: Tensor,
        *,
        main: float = 1.0,
        aux: float = 1.0,
        incoming: Tensor | None = None,
        mask: Tensor | None = None,
        call: Callable[[nn.Module, Tensor], Reading] | None = None,
    ) -> Step:
        """A pass both ways, of L = main <g, y> + aux aux_loss.

        incoming: g, as it arrives at y; a seeded one by default.
        call: stands for the forward pass, `Subject.call` by default.
        """
        layer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        with same_draws(self.seed, [x]):
            reading = self.call(layer, leaf, mask) if call is None else call(layer, leaf)
            self.back(reading, main, aux, incoming)
        return Step(reading, {"x": leaf.grad, **gradients(layer)})

    def back(
        self, reading: Reading, main: float = 1.0, aux: float = 1.0, incoming: Tensor | None = None
    ) -> None:
        """The backward pass of L."""
        y, loss = reading.hidden_states, reading.aux_loss
        g = self.incoming(y) if incoming is None else incoming
        outputs, arriving = [], []
        if y.requires_grad:
            outputs.append(y)
            arriving.append(g if main == 1.0 else main * g)
        if loss is not None and loss.requires_grad and aux != 0.0:
            outputs.append(loss)
            arriving.append(torch.full_like(loss, aux))
        if outputs:
            torch.autograd.backward(outputs, arriving)

    def declared(self, layer: nn.Module, x: Tensor, main: float = 1.0, aux: float = 1.0) -> Step:
        """The pass of the surrogate; a loss that only it returns is added with factor 1."""
        surrogate = self.surrogate
        assert surrogate is not None

        def run(module: nn.Module, leaf: Tensor) -> Reading:
            with same_draws(self.seed, [leaf]):
                return self.adapter.read(module, surrogate(module, leaf))

        return self.step(layer, x, main=main, aux=aux if self.has_loss else 1.0, call=run)

    def outputs(self, *, training: bool) -> tuple[str, ...]:
        """What of "y" and "aux_loss" there is in a mode."""
        has_loss = self.has_loss if training else self.has_loss_at_rest
        return ("y", "aux_loss") if has_loss else ("y",)

    @property
    def may_attach(self) -> bool:
        """Whether the gradient of y may be that of a loss of all tokens, too."""
        return self.surrogate is not None and not self.has_loss

    def update(self, layer: nn.Module) -> None:
        """What a training loop does after the optimizer's step, where that is known."""
        if self.adapter.update is not None:
            self.adapter.update(layer)
            return
        for name in _UPDATES:
            method = getattr(layer, name, None)
            if callable(method) and not _required(method):
                method()

    # ---- What is known of the layer -----------------------------------------------------------

    def role(self, name: str) -> str:
        """The word for it: "router", "experts", "shared experts", "layer", or "x" for the input."""
        return "x" if name == "x" else self.adapter.role(self._template, name)

    def names(self, role: str) -> list[str]:
        """The parameters of a role that require a gradient."""
        return [
            name
            for name, parameter in self._template.named_parameters()
            if parameter.requires_grad and self.role(name) == role
        ]

    def expert_dimensions(self, name: str, tensor: Tensor) -> list[int]:
        """The dimensions of a parameter or buffer that may count the experts, at most one in truth.

        That of a router's tensors and of vectors is any, that of all others the first; and so where
        E = H, which another dimension may count.
        """
        role = self.role(name)
        if role == "shared experts" or self._place_in_list(name) is not None:
            return []
        found = [d for d, size in enumerate(tensor.shape) if size == self.num_experts]
        if tensor.numel() == self.num_experts:
            return found
        if role == "router" and (self.num_experts != self.hidden_size or found[:1] == [0]):
            return found
        return [d for d in found if d == 0]

    def renumbered(self, name: str, order: Tensor) -> str:
        """The name of the same tensor in expert order[i], for one of expert i in a list."""
        place = self._place_in_list(name)
        if place is None:
            return name
        parts = name.split(".")
        parts[place] = str(int(order[int(parts[place])]))
        return ".".join(parts)

    def _place_in_list(self, name: str) -> int | None:
        """Which part of the name is an expert's number."""
        path = self.adapter.experts_path(self._template)
        if path is None or not name.startswith(f"{path}."):
            return None
        parts = name.split(".")
        numbers = [i for i in range(path.count(".") + 1, len(parts)) if parts[i].isdigit()]
        return numbers[0] if numbers and int(parts[numbers[0]]) < (self.num_experts or 0) else None

    def left_out(self, name: str) -> bool:
        """Whether the adapter says that the parameter gets no gradient on purpose."""
        return name.startswith(self.adapter.without_gradient)

    def _find_leading_dimensions(self) -> None:
        layer, errors = self.fresh(training=False), []
        for leading in ((), (1,)):
            self.leading = leading
            x = self.tokens(NUM_TOKENS)
            try:
                with torch.no_grad():
                    y = self.call(layer, x).hidden_states
                if y.shape == x.shape:
                    return
                errors.append(f"y of shape {list(y.shape)}")
            except TypeError:
                raise
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        raise RuntimeError(
            "certify: layer must map [T, H] or [1, T, H] to its own shape, got "
            + "; then ".join(errors)
        )

    @torch.no_grad()
    def _find_out(self) -> None:
        x = self.tokens(NUM_TOKENS)
        look = Look(NUM_TOKENS, self.top_k or 1, self.num_experts or 0)
        observer = Observer()
        with look, observer:
            reading = self.call(self.fresh(), x)
        self.has_loss = reading.aux_loss is not None
        parts = (self.adapter.router_path, self.adapter.experts_path)
        #: Whether anything is seen that a mixture of experts has.
        self.is_mixture = (
            self.has_loss
            or reading.logits is not None
            or any(path(self._template) is not None for path in parts)
        )
        at_rest = self.call(self.fresh(training=False), x)
        self.has_loss_at_rest = at_rest.aux_loss is not None
        # A draw may change nothing this time: whether there is one, the generator tells.
        with same_draws(self.seed, [x]):
            state = torch.get_rng_state()
            self.adapter.call(self.fresh(), x)
            self.draws = not torch.equal(state, torch.get_rng_state())
        #: Ops that replace the derivative on purpose.
        self.replaced = observer.seen.replaced_derivatives
        self.narrowest = observer.seen.narrowest if self.dtype == torch.float64 else self.dtype
        sizes = [NUM_TOKENS, *(n for p in self._template.parameters() for n in p.shape)]
        narrow = self.narrowest.itemsize <= 2
        roundings = ROUNDINGS_16 if narrow else _ROUNDINGS * max(sizes)
        #: c n eps, n the longest reduction, where every term is rounded.
        self.tolerance = roundings * torch.finfo(self.narrowest).eps
        self.sharing = self._sharing(look)
        self.mask = self._find_mask(x, at_rest.hidden_states)
        try:
            batch = self.tokens(6).reshape(2, 3, self.hidden_size)
            y = self.call(self.fresh(training=False), batch).hidden_states
            self.takes_batches = y.shape == batch.shape
        except Exception:
            self.takes_batches = False

    def _sharing(self, look: Look) -> Sharing | None:
        if self.adapter.per_token is not None:
            told = Sharing("the adapter says that tokens share a decision", values=True)
            return None if self.adapter.per_token else told
        declared = declared_sharing(self._template)
        if declared is None and look.over_tokens is not None:
            op = look.over_tokens.split("::")[1]
            does = "counts" if op in COUNTING else "ranks"
            return Sharing(f"{op} {does} over the tokens", values=False)
        return declared

    def _find_mask(self, x: Tensor, plain: Tensor) -> Mask | None:
        counted = torch.ones(x.shape[:-1], dtype=torch.bool)
        half = counted.clone()
        half.view(-1)[::2] = False
        for name in self.adapter.mask_names(self._template):
            for true_counts in (True, False):
                self.mask = Mask(name, true_counts)
                try:
                    ys = [
                        self.call(self.fresh(training=False), x, mask).hidden_states
                        for mask in (counted, half)
                    ]
                except Exception:
                    continue
                if torch.allclose(ys[0], plain) and not torch.allclose(ys[1], plain):
                    return self.mask
        if self.adapter.token_mask is not None:
            raise ValueError(
                "Adapter: token_mask must be a keyword of forward that takes a bool mask and "
                f"masks tokens, got {self.adapter.token_mask!r}"
            )
        return None


def _required(method: Callable[..., Any]) -> list[str]:
    """The arguments that a method cannot be called without."""
    parameters = inspect.signature(method).parameters.values()
    named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [parameter.name for parameter in named if parameter.default is parameter.empty]


class _Called(nn.Module):
    """A layer that returns what is read of it."""

    def __init__(self, subject: Subject, layer: nn.Module, mask: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self._subject, self._mask = subject, mask

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The values y and aux_loss by name."""
        reading = self._subject.call(self.layer, x, self._mask)
        values = {"y": reading.hidden_states}
        return values if reading.aux_loss is None else values | {"aux_loss": reading.aux_loss}
