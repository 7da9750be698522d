"""The experts function under a name in transformers' own tables."""

from __future__ import annotations

from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from torchmoe._checks import shown
from torchmoe.integrations.transformers.experts import experts_forward


def register(name: str = "torchmoe") -> None:
    """Makes this library's experts an implementation that transformers' models can be told to use.

    After it `from_pretrained` and `from_config` take `experts_implementation=name`, and so does
    `model.set_experts_implementation(name)`. Nothing of transformers is replaced. A second call
    with the same name changes nothing.

    Experts that are quantised or split among processes are refused when they are called; the error
    says what they are and which implementations are left.

    Args:
        name: what the implementation is called.

    Raises:
        TypeError: name is not a string.
        ValueError: name is empty, or that of another implementation.
    """
    if not isinstance(name, str):
        raise TypeError(f"register: name must be a string, got {shown(name)}")
    # Those of 8-bit floats are told apart by the class, not by the name: registered there, too,
    # they are refused by an error that says why.
    tables = (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)
    taken = {key for table in tables for key in table if table[key] is not experts_forward}
    if not name or name in {"eager", *taken}:
        others = ", ".join(sorted({"eager", *taken}))
        raise ValueError(
            f"register: name must be none that transformers has ({others}), got {name!r}"
        )
    for table in tables:
        table.register(name, experts_forward)
