"""Runs the experts of Hugging Face Transformers' models with this library's ops.

`register` adds them to transformers' own choice of implementations, after which a model takes them
by `experts_implementation="torchmoe"`; `supported` says how a module of experts is computed.
`python -m torchmoe.integrations.transformers` lists the answers for every class of the installed
version. Import it by its name: `import torchmoe.integrations.transformers`.
"""

from torchmoe.integrations.transformers import _requirement

_requirement.check()

from torchmoe.integrations.transformers.experts import supported  # noqa: E402
from torchmoe.integrations.transformers.registration import register  # noqa: E402

__all__ = ["register", "supported"]
