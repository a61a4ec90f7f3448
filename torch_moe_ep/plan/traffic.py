"""Bytes that one GPU sends in a step, on NVLink and on the network.

A ring carries gathers and reductions: every rank sends (n - 1) / n of the whole. Where the group
spans nodes, one of the ranks of a node sends its part over the network and the others theirs over
NVLink, so that m ranks on a node share the crossing. Rows travel by all-to-all, over nodes in two
hops (docs/transport.md). Figures are means over the ranks and over uniform routing.
"""

from dataclasses import dataclass
from math import comb

from torch_moe_ep.plan.layout import Batch, Layout
from torch_moe_ep.plan.shape import ModelShape
from torch_moe_ep.plan.weights import num_parameters, weights_of


@dataclass(frozen=True)
class Bytes:
    """Bytes that a GPU sends.

    Attributes:
        nvlink: to GPUs of its node.
        network: to other nodes.
    """

    nvlink: float = 0.0
    network: float = 0.0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.nvlink + other.nvlink, self.network + other.network)

    def __mul__(self, times: float) -> "Bytes":
        return Bytes(self.nvlink * times, self.network * times)


@dataclass(frozen=True)
class Traffic:
    """What a GPU sends in a step.

    Attributes:
        rows: of the exchange of tokens.
        weights: of gathers and reductions.
    """

    rows: Bytes
    weights: Bytes


def traffic_of(model: ModelShape, layout: Layout, batch: Batch) -> Traffic:
    """Bytes of a step."""
    crossing = rows_per_crossing(model, layout, batch)
    return Traffic(crossing * (crossings(layout) * model.layers), weight_bytes(model, layout))


def crossings(layout: Layout) -> int:
    """How often a layer's rows travel: dispatch and combine, forward, backward, recomputation."""
    return 6 if layout.checkpointing == "full" else 4


def rows_per_crossing(model: ModelShape, layout: Layout, batch: Batch) -> Bytes:
    """Bytes of a layer's rows in one direction.

    In one node each of T K copies goes to another rank with probability (P - 1) / P. Over M nodes
    a token crosses once to each other node that has one of its experts.
    """
    if layout.ep == 1:
        return Bytes()
    row = layout.precision.compute * model.hidden
    on_node = layout.ranks_on_node(layout.ep, 1)
    nodes = layout.ep // on_node
    copies = batch.tokens * model.top_k * (on_node - 1) / on_node
    return Bytes(copies * row, batch.tokens * other_nodes(model, nodes) * row)


def other_nodes(model: ModelShape, nodes: int) -> float:
    """Other nodes that a token's K experts are on, expected over uniform routing.

    >>> from torch_moe_ep.plan.shape import KNOWN
    >>> round(other_nodes(KNOWN["mistralai/mixtral-8x7b-v0.1"], 2), 3)
    0.786
    """
    elsewhere = comb(model.experts - model.experts // nodes, model.top_k)
    return (nodes - 1) * (1 - elsewhere / comb(model.experts, model.top_k))


def weight_bytes(model: ModelShape, layout: Layout) -> Bytes:
    """Bytes of all gathers and reductions.

    Layers are gathered in forward and in backward, the root once; gradients are reduced once, and
    those of the experts then averaged over the replicas.
    """
    weights, precision = weights_of(model), layout.precision
    experts = num_parameters(weights, "expert") // layout.ep
    dense, root = num_parameters(weights, "layer"), num_parameters(weights, "root")
    shard_group = (layout.shard, layout.ep)
    replicas = (layout.replicate, layout.ep * layout.shard)
    compute, reduce = precision.compute, precision.reduce
    return (
        ring(experts * (2 * compute + reduce), layout, *shard_group)
        + ring(2 * experts // layout.shard * reduce, layout, *replicas)
        + ring(dense * (2 * compute + reduce), layout, layout.world, 1)
        + ring(root * (compute + reduce), layout, layout.world, 1)
    )


def ring(whole: float, layout: Layout, size: int, stride: int) -> Bytes:
    """Bytes that a rank sends while a ring of `size` ranks gathers or reduces `whole` bytes.

    >>> from torch_moe_ep.plan.layout import PRECISIONS
    >>> two_nodes = Layout(8, 2, 1, 2, PRECISIONS["bf16"])
    >>> ring(160.0, two_nodes, 16, 1)  # 150 sent, one of 8 ranks across
    Bytes(nvlink=131.25, network=18.75)
    >>> ring(160.0, two_nodes, 2, 8)
    Bytes(nvlink=0.0, network=80.0)
    """
    sent = whole * (size - 1) / size
    on_node = layout.ranks_on_node(size, stride)
    across = sent / on_node if on_node < size else 0.0
    return Bytes(sent - across, across)
