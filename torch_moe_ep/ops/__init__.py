"""The differentiable operators, one module for each stage, in pipeline order.

    weights, expert_ids = route(logits, top_k)                     # or Hugging Face's own router
    plan = plan(expert_ids, num_experts, group_name=...)           # where each copy goes
    rows, row_weights = dispatch(x, weights, plan)                 # copies -> expert owners
    y = expert_mlp(rows, row_weights, plan, gate_up, down)         # silu(gate) * up, per expert
    x = combine(y, plan)                                           # results -> sum over K

`node_plan`, `node_dispatch` and `node_combine` stand in for plan, dispatch and combine where a
group spans nodes: a token crosses to each node once. `peer_plan`, `peer_dispatch` and
`peer_combine` do where GPUs map each other's memory: rows are written and read where they belong.

`plan_chunks` and `chunked_experts` stand in for all four after route: tokens travel in chunks, each
under the GEMMs of the one before; `peer_plan_chunks` for the first where GPUs map each other's
memory.

The C++ and CUDA code is in ``csrc``, under the same names; ``torch_moe_ep.reference`` holds
readable twins in plain torch. T tokens of this rank, K experts per token, N = T * K copies, E
experts, P ranks of the EP group, L = E / P local experts, R slots, H hidden size, I expert width.
"""

from torch_moe_ep import _library  # noqa: F401  registers the operators
from torch_moe_ep.ops.chunked_experts import chunked_experts
from torch_moe_ep.ops.combine import combine
from torch_moe_ep.ops.dispatch import dispatch
from torch_moe_ep.ops.expert_mlp import expert_mlp
from torch_moe_ep.ops.node_combine import node_combine
from torch_moe_ep.ops.node_dispatch import NodePlan, node_dispatch, node_plan
from torch_moe_ep.ops.peer_combine import peer_combine
from torch_moe_ep.ops.peer_dispatch import PeerPlan, peer_dispatch, peer_plan
from torch_moe_ep.ops.peer_plan_chunks import peer_plan_chunks
from torch_moe_ep.ops.plan import DispatchPlan, SendBuffer, plan, plan_and_pack
from torch_moe_ep.ops.plan_chunks import ChunkPlan, plan_chunks
from torch_moe_ep.ops.route import route
from torch_moe_ep.ops.sinkhorn import sinkhorn

__all__ = [
    "ChunkPlan",
    "DispatchPlan",
    "NodePlan",
    "PeerPlan",
    "SendBuffer",
    "chunked_experts",
    "combine",
    "dispatch",
    "expert_mlp",
    "node_combine",
    "node_dispatch",
    "node_plan",
    "peer_combine",
    "peer_dispatch",
    "peer_plan",
    "peer_plan_chunks",
    "plan",
    "plan_and_pack",
    "plan_chunks",
    "route",
    "sinkhorn",
]
