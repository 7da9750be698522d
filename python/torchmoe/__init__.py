"""Mixture-of-experts layers for PyTorch: ops in C++ with their gradients, and modules.

`torchmoe.nn` has the layer and its parts, `torchmoe.ops` the functions that they are composed of,
`torchmoe.losses` further balancing terms, and `torchmoe.presets` the conventions of other
libraries. `watch` and `routing_statistics` show what the routing does, `geometry` how a router
divides the space. `RoutingReplay` repeats the choices of one pass in another, `RoutingCache` those
of earlier inputs for similar ones. `torchmoe.testing` certifies any mixture-of-experts layer, read
through an `Adapter`, and checks your own gradients. `torchmoe.offload`, which is imported by its
name, streams experts that do not fit into memory.
`python -m torchmoe` prints what a bug report needs.
"""

from torchmoe._report import reported

with reported():
    from torchmoe import _flop_formulas, _library

    _BUILD_INFO = _library.load()
_flop_formulas.register()

# The ops must be registered before any module that names them is imported.
from torchmoe import losses, nn, ops, presets, testing  # noqa: E402
from torchmoe.adapter import Adapter  # noqa: E402
from torchmoe.capacity import dynamic_capacity, expert_capacity  # noqa: E402
from torchmoe.memory import keep_freed_memory  # noqa: E402
from torchmoe.monitor import (  # noqa: E402
    RouterGeometry,
    RoutingStatistics,
    Watcher,
    geometry,
    routing_statistics,
    watch,
)
from torchmoe.nn.routing_cache import CachedRouting, RoutingCache  # noqa: E402
from torchmoe.replay import RoutingReplay  # noqa: E402
from torchmoe.selection_bias import update_selection_bias  # noqa: E402

__version__ = _BUILD_INFO["torchmoe"]

#: Folder for CMAKE_PREFIX_PATH, so that a C++ program finds `find_package(torchmoe)` inside an
#: installed wheel.
cmake_prefix_path = str(_library.PACKAGE / "share" / "cmake")


def build_info() -> dict[str, str]:
    """How this copy was built.

    Returns:
        The keys torchmoe, torch, compiler, cuda, openmp and git_revision. A value that does not
        exist or is not known is "none" or "unknown".
    """
    return dict(_BUILD_INFO)


__all__ = [
    "Adapter",
    "CachedRouting",
    "RouterGeometry",
    "RoutingCache",
    "RoutingReplay",
    "RoutingStatistics",
    "Watcher",
    "__version__",
    "build_info",
    "cmake_prefix_path",
    "dynamic_capacity",
    "expert_capacity",
    "geometry",
    "keep_freed_memory",
    "losses",
    "nn",
    "ops",
    "presets",
    "routing_statistics",
    "testing",
    "update_selection_bias",
    "watch",
]
