"""Derivatives of derivatives, forward mode and the compiler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from torchmoe.adapter import Reading
from torchmoe.testing.certify.finite_differences import Function, against_differences
from torchmoe.testing.certify.law import Answer, Gap, Law, Note, differences
from torchmoe.testing.certify.subject import Subject


def ask(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """Right or refused: what raises an error is noted, what is silently wrong is found."""
    if subject.surrogate is not None:
        why = "the layer declares a surrogate, which is no derivative of its output"
        yield Gap("double backward and forward mode", why)
    else:
        yield from _double_backward(subject, num_tokens)
        yield from _forward_mode(subject, num_tokens)
    yield from _compiled(subject, num_tokens)


def _double_backward(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """d/dtheta of s = sum <u, dL/dtheta>, by .backward(), against differences of s."""
    layer = subject.fresh()
    function = _slope(subject, subject.function(layer))
    point = subject.point(layer, subject.tokens(num_tokens))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in point.items()}
    try:
        # Not by torch.autograd.grad, which walks past a refusal on a path that leads to no input.
        slope = function(leaves)["s"]
        if slope.requires_grad:
            torch.autograd.backward(slope)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        yield Note(f"double backward is refused: {_first_line(error)}")
        return
    yield from against_differences(
        "double backward",
        function,
        lambda stream: subject.point(subject.fresh(), subject.tokens(num_tokens, stream)),
        ("s",),
        subject.role,
        subject.seed,
    )


def _slope(subject: Subject, function: Function) -> Function:
    """The first derivative along fixed directions, as a function of the same tensors."""

    def slope(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.enable_grad():
            points = {
                name: tensor if tensor.requires_grad else tensor.detach().requires_grad_()
                for name, tensor in tensors.items()
            }
            values = function(points)
            y = values["y"]
            loss = (subject.incoming(y) * y).sum()
            if "aux_loss" in values and values["aux_loss"].requires_grad:
                loss = loss + values["aux_loss"]
            grads = torch.autograd.grad(
                loss, list(points.values()), create_graph=True, allow_unused=True
            )
            terms = [
                (subject.incoming(grad, stream) * grad).sum()
                for stream, grad in enumerate(grads)
                if grad is not None
            ]
            return {"s": torch.stack(terms).sum()}

    return slope


def _forward_mode(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """<g, df(v)> = <grad, v>, df from dual numbers."""
    layer = subject.fresh()
    function = subject.function(layer)
    point = subject.point(layer, subject.tokens(num_tokens))
    step = subject.step(subject.fresh(), point["x"], aux=0.0)
    for role in sorted({subject.role(name) for name in point}):
        tangents = {
            name: subject.incoming(tensor, 20 + stream)
            for stream, (name, tensor) in enumerate(point.items())
            if subject.role(name) == role
        }
        terms = [
            grad * tangent
            for name, tangent in tangents.items()
            if (grad := step.gradients[name]) is not None
        ]
        expected = sum((term.sum() for term in terms), torch.zeros((), dtype=subject.dtype))
        # The sum's terms may cancel: it is as exact as they are large.
        size = sum((term.abs().sum() for term in terms), step.reading.hidden_states.abs().sum())
        try:
            with forward_ad.dual_level():
                dual = {
                    name: forward_ad.make_dual(tensor, tangents[name])  # type: ignore[no-untyped-call]
                    if name in tangents
                    else tensor
                    for name, tensor in point.items()
                }
                moved = forward_ad.unpack_dual(function(dual)["y"])  # type: ignore[no-untyped-call]
        except (RuntimeError, NotImplementedError, ValueError) as error:
            yield Note(f"forward mode is refused: {_first_line(error)}")
            return
        change = torch.zeros_like(moved.primal) if moved.tangent is None else moved.tangent
        got = (subject.incoming(step.reading.hidden_states) * change).sum()
        yield from differences(
            "forward mode",
            {f"<g, dy> along the {role}": expected, "size": size},
            {f"<g, dy> along the {role}": got, "size": size},
            64 * subject.tolerance,
            "An op has no tangent of its own: torch takes it as 0 and says nothing.",
        )


def _compiled(subject: Subject, num_tokens: int) -> Iterator[Answer]:
    """torch.compile(layer) = layer, both ways."""
    import torch._dynamo  # takes seconds to load

    layer, x = subject.fresh(), subject.tokens(num_tokens)
    expected = subject.step(subject.fresh(), x)
    # Every certificate compiles another copy of the same code.
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=4096):
        compiled = torch.compile(layer, backend="aot_eager")

        def run(module: nn.Module, leaf: Tensor) -> Reading:
            return subject.adapter.read(module, compiled(leaf))

        try:
            got = subject.step(layer, x, call=run)
        except Exception as error:  # whatever the compiler raises
            yield Note(f"torch.compile refuses: {_first_line(error)}")
            return
    yield from differences(
        "compiled as eager",
        expected.everything,
        got.everything,
        64 * subject.tolerance,
        "The layer asks whether it is compiled, or an op tells the compiler another shape or alias "
        "than it has.",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


LAW = Law(
    name="higher_orders",
    formula="double backward, forward mode: right or refused; compile(layer) = layer",
    means="A derivative of higher order is silently wrong.",
    ask=ask,
    smallest=2,
)
