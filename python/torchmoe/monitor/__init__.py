"""Shows how a model routes while it trains, and what its routers have learned.

`routing_statistics` reads one layer's `Routing`; `watch` follows every layer of a model; `geometry`
reads a router's weights.
"""

from torchmoe.monitor.geometry import RouterGeometry, geometry
from torchmoe.monitor.statistics import RoutingStatistics, routing_statistics
from torchmoe.monitor.watch import Watcher, watch

__all__ = [
    "RouterGeometry",
    "RoutingStatistics",
    "Watcher",
    "geometry",
    "routing_statistics",
    "watch",
]
