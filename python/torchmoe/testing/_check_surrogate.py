"""The gradient check for functions that replace the derivative on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from torchmoe._checks import check_flag, check_integer, check_positive, shown
from torchmoe.nn.estimators.estimator import Estimator
from torchmoe.testing._declared import check_declared
from torchmoe.testing._estimator_surrogate import check_estimator


def check_surrogate(
    subject: str | Estimator | Callable[..., Any],
    inputs: Tensor | Sequence[Any] | None = None,
    *,
    surrogate: Callable[..., Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    eps: float = 1e-6,
    raise_exception: bool = True,
    **layer: Any,  # noqa: ANN401 (see below, and the arguments of MoE)
) -> bool:
    """Whether a gradient is the derivative of its declared surrogate.

    A gradient that replaces the derivative on purpose cannot be compared with the derivative of the
    output. It is compared with that of a surrogate instead: the function's gradient with finite
    differences of the surrogate, in float64, so the two share no backward pass.

    Your own function, router or layer declares a function of the same arguments, with the same
    outputs or the first of them, whose ordinary gradient is the intended one:

        check_surrogate(function, inputs, surrogate=s)    calls s(*inputs, **kwargs)
        check_surrogate(module, inputs, surrogate=s)      calls s(module, *inputs, **kwargs)
        check_surrogate(module, inputs)                   calls module.surrogate(*inputs, **kwargs)

    Its values need not be the function's. Whatever it detaches is held constant, such as the weight
    p and the output G in (p - p.detach()) * G.detach(). Inputs and parameters are sampled as in
    `gradcheck`.

    An estimator declares weights [T, E] by `Estimator.surrogate(logits, selected, indices)`, and is
    tested in a layer. With s these weights, and a bar over values held constant at the point of the
    check, the layer's gradient must be the derivative of

        y = sum over slots j of w_j_bar E_{i_j}(x) + sum over experts i of (s_i - s_i_bar) E_i_bar

    with the ids that the layer chose there, times its routed_scaling_factor, plus its shared
    experts if it has any. The router therefore learns from s, and x and the experts learn from the
    actual weights. The value of the formula must also equal the layer's output. An estimator
    without a surrogate is checked against the derivative of the layer's output, with `gradcheck`.
    If it has buffers, they are updated once beforehand.

    Args:
        subject: a module or function; or an estimator, a registered name or an instance. Modules
            and estimators are copied.
        inputs: the positional arguments of a module or function: one tensor, or a sequence.
        surrogate: the surrogate of a module or function; by default the module's method of that
            name.
        kwargs: the keyword arguments of a module or function.
        seed: for the directions and the draws; for an estimator also for its layer and tokens.
        eps: the smallest step of the finite difference.
        raise_exception: raise on a wrong gradient instead of returning False.
        **layer: for an estimator, the layer it is tested in: num_tokens (7), hidden_size (4),
            intermediate_size (3), num_experts (5), top_k (2), score_function ("softmax"), normalize
            (None), masked_tokens (0, tokens that do not count), training (True), and any other
            arguments of `MoE` such as capacity or router; and for the check, which goes through
            every entry: atol (1e-6), rtol (1e-5) and fast_mode (False; True checks one random
            direction instead).

    Returns:
        True if the gradient is that of the surrogate; False if not and raise_exception is False.

    Raises:
        GradcheckError: the gradient is wrong, or an estimator's layer has another output (a
            RuntimeError from torch.autograd.gradcheck).
        UnstableSelectionError: the surrogate jumps within a step; the message says how to avoid it.
        TypeError: an argument has another type, a module is sharded, or a surrogate is missing or
            takes other arguments; the message says which ones are right.
        RuntimeError: a surrogate returns other outputs.
        ValueError: a number is out of range, the layer cannot be built, or an argument is for the
            other kind of subject.
    """
    check_integer("check_surrogate", "seed", seed)
    check_positive("check_surrogate", "eps", eps)
    check_flag("check_surrogate", "raise_exception", raise_exception)
    if not isinstance(subject, str | Estimator) and not callable(subject):
        raise TypeError(
            "check_surrogate: subject must be a module, a function or an estimator, got "
            f"{shown(subject)}"
        )
    of_function = {"inputs": inputs, "surrogate": surrogate, "kwargs": kwargs}
    try:
        if isinstance(subject, str | Estimator):
            given = {name: value for name, value in of_function.items() if value is not None}
            _refuse(given, "a module or function", subject)
            check_estimator(subject, seed=seed, eps=eps, **layer)
        else:
            _refuse(layer, "an estimator", subject)
            if inputs is None:
                raise TypeError(
                    "check_surrogate: inputs must be given for a module or function, got None"
                )
            check_declared(subject, inputs, kwargs, surrogate, seed, eps)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


def _refuse(given: Mapping[str, Any], kind: str, subject: object) -> None:
    for name in given:
        raise ValueError(
            f"check_surrogate: {name} must be left out except for {kind}, "
            f"got it for {shown(subject)}"
        )
