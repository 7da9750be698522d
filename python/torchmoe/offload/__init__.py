"""Runs experts that do not fit into memory: they lie in a file and are read as they are needed.

`offload` moves frozen experts into a file and gives a module that takes their place; `link` lets a
layer ask for the next layer's experts; `write_store` writes experts of a model that fits into no
memory. Import it by its name: `import torchmoe.offload`.
"""

from torchmoe.offload.experts import OffloadedExperts, offload
from torchmoe.offload.linking import link
from torchmoe.offload.store import ExpertStore, write_store

__all__ = ["ExpertStore", "OffloadedExperts", "link", "offload", "write_store"]
