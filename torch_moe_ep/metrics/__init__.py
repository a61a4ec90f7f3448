"""What experts, routers and process groups did: load, losses, entropy, traffic.

counters    read on demand; collective, and the host waits
recorder    a record a step: to a dict, TensorBoard and JSON lines, without a wait of the host
entropy     how sure the routers are
writers     where records go
"""

from torch_moe_ep.metrics.counters import (
    ExpertLoad,
    NodeTraffic,
    RouterLosses,
    StageTraffic,
    expert_load,
    node_traffic,
    reset_expert_load,
    router_losses,
    traffic,
)
from torch_moe_ep.metrics.recorder import Recorder
from torch_moe_ep.metrics.writers import JsonLines, TensorBoard

__all__ = [
    "ExpertLoad",
    "JsonLines",
    "NodeTraffic",
    "Recorder",
    "RouterLosses",
    "StageTraffic",
    "TensorBoard",
    "expert_load",
    "node_traffic",
    "reset_expert_load",
    "router_losses",
    "traffic",
]
