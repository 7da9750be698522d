"""Offloaded experts under transforms, checkpoints, autocast, hooks and compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from selectively import selectively
from streamed import Call, Pair, drawn, gradients, pair

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(params=[2, 8], ids=["some", "all"])
def given(request: pytest.FixtureRequest) -> Pair:
    return pair(num_slots=request.param)


@pytest.fixture
def call(given: Pair) -> Call:
    return drawn(given.resident, 20, 2)


def assert_alike(given: Pair, run: Callable[[Experts], tuple[Tensor, ...] | list[Tensor]]) -> None:
    """Both experts give the same bits."""
    # Twice: other experts are resident the second time.
    for _ in range(2):
        expected, actual = run(given.resident), run(given.offloaded)
        assert len(expected) == len(actual)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def loss_of(experts: Experts, call: Call) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weights: (experts(x, call.indices, weights) * call.grad).sum()


def test_gradients_by_transforms(given: Pair, call: Call) -> None:
    at = call.x, call.weights
    assert_alike(given, lambda e: grad(loss_of(e, call), argnums=(0, 1))(*at))
    assert_alike(given, lambda e: vjp(loss_of(e, call), *at)[1](torch.tensor(2.0)))


def test_a_gradient_around_a_gradient_of_something_else(given: Pair, call: Call) -> None:
    """The inner transform's tensors do not tell that the outer one wants a gradient."""

    def run(experts: Experts) -> tuple[Tensor]:
        def outer(weights: Tensor) -> Tensor:
            # What the inner transform makes of the weights requires no gradient there.
            inner = grad(lambda a: a * loss_of(experts, call)(call.x, weights * 2))
            return inner(torch.tensor(2.0))

        return (grad(outer)(call.weights),)

    assert_alike(given, run)


def test_a_graph_of_the_gradient(given: Pair, call: Call) -> None:
    def run(experts: Experts) -> list[Tensor]:
        x = call.x.clone().requires_grad_()
        return [*torch.autograd.grad(loss_of(experts, call)(x, call.weights), x, create_graph=True)]

    assert_alike(given, run)


@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_second_derivatives_are_refused(given: Pair, call: Call, first: int, by: int) -> None:
    leaves = [call.x.clone().requires_grad_(), call.weights.clone().requires_grad_()]
    y = loss_of(given.offloaded, call)(*leaves)
    (of_first,) = torch.autograd.grad(y, leaves[first], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^OffloadedExperts: derivatives must be first ones in"):
        torch.autograd.grad(of_first.sum(), leaves[by])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian], ids=lambda t: t.__name__)
def test_transforms_that_are_refused(given: Pair, call: Call, transform: Any) -> None:
    with pytest.raises(RuntimeError, match=r"^OffloadedExperts: "):
        transform(loss_of(given.offloaded, call), argnums=(0, 1))(call.x, call.weights)


@pytest.mark.parametrize("name", ["x", "indices", "weights"])
def test_batches_are_refused(given: Pair, call: Call, name: str) -> None:
    arguments = {"x": call.x, "indices": call.indices, "weights": call.weights}
    batch = torch.stack([arguments.pop(name)] * 2)
    with pytest.raises(RuntimeError, match=f"^OffloadedExperts: {name} must be of one sample"):
        vmap(lambda one: given.offloaded(**arguments, **{name: one}))(batch)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_tangents_are_refused(given: Pair, call: Call, grad_mode: bool) -> None:
    with pytest.raises(RuntimeError, match=r"^OffloadedExperts: derivatives must be first ones in"):
        jvp(loss_of(given.offloaded, call), call[::2][:2], call[::2][:2])
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        dual = forward_ad.make_dual(call.x, call.x)
        with pytest.raises(RuntimeError, match=r"^OffloadedExperts: derivatives must be first"):
            given.offloaded(dual, call.indices, call.weights)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(given: Pair, call: Call, use_reentrant: bool) -> None:
    """When a call is repeated other experts are resident, and its rows are in another order."""

    def run(experts: Experts) -> list[Tensor]:
        def repeated(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            return checkpoint(
                lambda *a: experts(torch.tanh(a[0]), *a[1:]),
                x, indices, weights,
                use_reentrant=use_reentrant,
            )  # fmt: skip

        outputs = gradients(repeated, call)
        others = drawn(given.resident, 5, 2)
        experts(*others[:3])
        return outputs

    assert_alike(given, run)


def test_a_checkpoint_whose_residents_have_changed(given: Pair, call: Call) -> None:
    other = drawn(given.resident, 20, 2)
    found = []
    for experts in given:
        x = call.x.clone().requires_grad_()
        y = checkpoint(experts, x, *call[1:3], use_reentrant=False)
        experts(*other[:3])
        y.backward(call.grad)
        found.append(x.grad)
    assert torch.equal(*found)


SAVED = {
    "nothing": (),
    "experts": (torch.ops.torchmoe._expert_mlp.default,),
    "tokens": (torch.ops.aten.index.Tensor, torch.ops.torchmoe.dispatch_plan.default),
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_selective_checkpoints(given: Pair, call: Call, save: tuple[object, ...]) -> None:
    """They tell results apart by the number of the op, which is another one the second time."""

    def run(experts: Experts) -> list[Tensor]:
        def repeated(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            y = selectively(experts, x, indices, weights, save=save)
            given.offloaded(*drawn(given.resident, 1, 2)[:3])
            return cast(Tensor, y)

        return gradients(repeated, call)

    assert_alike(given, run)


def test_floating_point_operations(given: Pair) -> None:
    counted = []
    call = drawn(given.resident, 20, 2, ids=torch.randint(0, 8, (20, 2)))
    for experts in given:
        with FlopCounterMode(display=False) as counter:
            gradients(experts, call)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_hooks_on_saved_tensors(given: Pair, call: Call) -> None:
    def run(experts: Experts) -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.tolist(), torch.tensor):
            return gradients(experts, call)

    assert_alike(given, run)


def test_saves_what_the_op_saves(given: Pair, call: Call) -> None:
    sizes = []
    for experts in given:
        saved: list[Tensor] = []

        def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            experts(call.x.clone().requires_grad_(), *call[1:3])
        held = [id(parameter) for parameter in given.resident.parameters()]
        floating = [t for t in saved if t.is_floating_point() and id(t) not in held]
        sizes.append(sorted(t.numel() for t in floating))
    assert sizes[0] == sizes[1]


def test_inference_mode(given: Pair, call: Call) -> None:
    """What it leaves behind must not keep a later call from having a gradient."""
    for _ in range(2):  # the second time nothing is read
        with torch.inference_mode():
            y = given.offloaded(*call[:3])
        assert torch.equal(y, given.resident(*call[:3]))
    assert_alike(given, lambda e: gradients(e, call))


def test_a_default_device(given: Pair, call: Call) -> None:
    expected = given.resident(*call[:3])
    with torch.device("meta"):
        y = given.offloaded(*call[:3])
    assert torch.equal(y, expected)


@pytest.mark.parametrize("num_slots", [2, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast(dtype: torch.dtype, num_slots: int) -> None:
    given = pair(num_slots=num_slots, dtype=dtype)
    call = drawn(given.resident, 20, 2)
    if dtype == torch.bfloat16:
        call = call._replace(x=call.x.float() + 1e-4)

    def run(experts: Experts) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(experts, call)

    assert_alike(given, run)


def test_autocast_to_another_dtype_is_refused(given: Pair, call: Call) -> None:
    message = "^OffloadedExperts: autocast must be of the experts' dtype"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match=message):
        given.offloaded(*call[:3])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled(given: Pair, call: Call) -> None:
    """The experts are outside of the graphs around them, between which torch warns for nothing."""

    def run(experts: Experts) -> list[Tensor]:
        def around(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            return experts(x * 2, indices, weights) + 1

        return gradients(torch.compile(around, backend="eager"), call)

    assert_alike(given, run)
