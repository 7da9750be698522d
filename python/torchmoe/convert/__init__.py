"""State dicts of other libraries' experts into this library's form, and back.

Import it by its name: `import torchmoe.convert`.
"""

from torchmoe.convert.stacking import stack_experts, unstack_experts

__all__ = ["stack_experts", "unstack_experts"]
