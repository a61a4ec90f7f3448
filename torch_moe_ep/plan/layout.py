"""One way to spread a model over GPUs, and all of those that divide."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from torch_moe_ep.plan.shape import ModelShape

CHECKPOINTING = ("none", "rows", "full")
OFFLOAD = ("none", "activations", "parameters")
ROW_ALIGNMENT = 128  # an expert's segment of rows on CUDA


@dataclass(frozen=True)
class Precision:
    """Bytes of an element.

    Attributes:
        name: as given on the command line.
        what: in words.
        parameter: of the sharded parameters.
        gradient: of the sharded gradients.
        optimizer: of AdamW's two moments together.
        compute: of gathered weights and activations.
        reduce: of gradients while they are reduced.
    """

    name: str
    what: str
    parameter: int
    gradient: int
    optimizer: int
    compute: int
    reduce: int

    @property
    def per_parameter(self) -> int:
        """Bytes of parameter, gradient and optimizer state together."""
        return self.parameter + self.gradient + self.optimizer


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("mixed", "fp32 weights, gradients and AdamW, bf16 compute", 4, 4, 8, 2, 4),
        Precision("bf16", "bf16 weights, gradients and AdamW", 2, 2, 4, 2, 2),
    )
}


@dataclass(frozen=True)
class Batch:
    """What one rank computes between two optimizer steps, without accumulation.

    Attributes:
        sequence: tokens of a sample.
        samples: samples of a rank.
    """

    sequence: int
    samples: int

    @property
    def tokens(self) -> int:
        """T, tokens of a rank."""
        return self.sequence * self.samples


@dataclass(frozen=True)
class Layout:
    """One way to spread a model.

    Attributes:
        ep: P, ranks that share one set of experts.
        shard: S, ranks over which FSDP shards each rank's experts.
        replicate: copies of the experts' state.
        nodes: machines, each with as many of the GPUs.
        precision: bytes of an element.
        checkpointing: "none"; "full": a layer keeps its input; "rows": also what it received
            from other ranks (`memory.checkpoint_contexts`).
        offload: "none"; "activations" on the host (`memory.offload_activations`); "parameters":
            parameters, gradients and optimizer on the host (FSDP2's `CPUOffloadPolicy`).
        row_alignment: rows that an expert's segment is padded to a multiple of.
    """

    ep: int
    shard: int
    replicate: int
    nodes: int
    precision: Precision
    checkpointing: str = "none"
    offload: str = "none"
    row_alignment: int = ROW_ALIGNMENT

    @property
    def world(self) -> int:
        """W, all ranks."""
        return self.ep * self.shard * self.replicate

    @property
    def has_fsdp(self) -> bool:
        """Whether weights are gathered: on a lone GPU only for a cast, or from the host."""
        is_cast = self.precision.parameter != self.precision.compute
        return self.world > 1 or is_cast or self.offload == "parameters"

    @property
    def ranks_per_node(self) -> int:
        """GPUs of a node."""
        return self.world // self.nodes

    def ranks_on_node(self, size: int, stride: int) -> int:
        """Ranks of a group of `size` ranks, `stride` apart, that share a node.

        Two nodes of 8: an EP group of 16 has 8 on each; a shard group of 2 with a stride of 8 has
        1 on each.

        >>> layout = Layout(8, 2, 1, 2, PRECISIONS["mixed"])
        >>> layout.ranks_on_node(16, 1), layout.ranks_on_node(2, 8), layout.ranks_on_node(4, 2)
        (8, 1, 4)
        """
        return max(1, gcd(size * stride, self.ranks_per_node) // stride)


def layouts(model: ModelShape, gpus: int, nodes: int, precision: Precision) -> Iterator[Layout]:
    """All layouts that divide: P divides E and W, P * S divides W.

    "rows" is left out at P = 1, where rows do not travel.

    >>> from torch_moe_ep.plan.shape import KNOWN
    >>> mixtral = KNOWN["mistralai/mixtral-8x7b-v0.1"]
    >>> grids = {(y.ep, y.shard) for y in layouts(mixtral, 4, 1, PRECISIONS["bf16"])}
    >>> sorted(grids)
    [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
    """
    for ep in _divisors(gcd(gpus, model.experts)):
        for shard in _divisors(gpus // ep):
            for checkpointing in CHECKPOINTING:
                if checkpointing == "rows" and ep == 1:
                    continue
                for offload in OFFLOAD:
                    replicate = gpus // (ep * shard)
                    yield Layout(ep, shard, replicate, nodes, precision, checkpointing, offload)


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
