"""Runs experts that do not fit into memory: they lie in a file and are read as they are needed.

`offload` moves frozen experts into a file and gives a module that takes their place; `link` lets a
layer ask for the next layer's experts; `write_store` writes experts of a model that fits into no
memory; `plan_offload` predicts how long a step takes, from what `measure_machine` measures. Opening
a store reads and hashes all of it once. Import it by its name: `import torchmoe.offload`.
"""

from torchmoe.offload.entry import offload
from torchmoe.offload.experts import OffloadedExperts
from torchmoe.offload.linking import link
from torchmoe.offload.planning import Machine, OffloadPlan, measure_machine, plan_offload
from torchmoe.offload.store import ExpertStore
from torchmoe.offload.writing import write_store

__all__ = [
    "ExpertStore",
    "Machine",
    "OffloadPlan",
    "OffloadedExperts",
    "link",
    "measure_machine",
    "offload",
    "plan_offload",
    "write_store",
]
