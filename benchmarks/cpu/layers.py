"""How fast is the layer compared with its peers and the dense bound?"""

from __future__ import annotations

import torch

from benchmarks import figures
from benchmarks.contenders import TRANSFORMERS, transformers_version
from benchmarks.cpu.section import Section, Settings
from benchmarks.markdown import table
from benchmarks.moe_layer import COLUMNS, Result, cells, conclusions, measure


def section_layers(settings: Settings) -> Section:
    """The table of `make bench`."""
    version = transformers_version()
    results: list[Result] = []
    for case in settings.cases:
        torch.manual_seed(0)
        peers = () if version is None else TRANSFORMERS
        results.append(measure(case, torch.float32, peers, settings.clock))
    rows = [
        [f"{result.case}", name, *cells(row)]
        for result in results
        for name, row in result.rows.items()
    ]
    ends = [f"- {result.case}: {'; '.join(conclusions(result))}" for result in results]
    return Section(
        "The layer and its peers",
        "A training step (forward and backward, routing included), or inference where it says "
        "forward only, in float32. D is the time over that of dense `torch.mm` of the same FLOPs, "
        "U the share of the probed FMA peak, P the time of the fastest peer over ours; each peer "
        f"(Transformers {version or 'is not installed'}) was first shown to compute the same. "
        "Fresh is the median with other tokens in every round: libraries that prepare a kernel "
        "for each number of rows do so there, until they have met them all. Forward only, the "
        "time is also given over that of reading the matrices of the chosen experts, and the "
        "microseconds beyond it. `make bench` prints this table.",
        [table(["T, H, I, E, K", "", *COLUMNS], rows, texts=2), "\n".join(ends)],
        {"cpu_layer.png": figures.layers(results)},
    )
