"""What the routing of a model does while it trains.

`routing_statistics` reads one layer's `Routing`; `watch` follows every layer of a model.
"""

from torchmoe.monitor.statistics import RoutingStatistics, routing_statistics
from torchmoe.monitor.watch import Watcher, watch

__all__ = ["RoutingStatistics", "Watcher", "routing_statistics", "watch"]
