"""Counters, read on demand: copies of each expert, router losses, traffic.

Every experts module counts its rank's copies per global expert once per backward (evaluation and
recomputation by activation checkpointing leave the counters alone). Counting is on the device and
costs no sync; reading is collective.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from torch_moe_ep.gather import sum_over_ranks
from torch_moe_ep.parallel.agreement import meet
from torch_moe_ep.parallel.state import states_of

NO_EXPERTS = "the model has no expert-parallel experts; call torch_moe_ep.apply_expert_parallel."


class ExpertLoad(NamedTuple):
    """Copies per expert since the last reset, summed over all ranks.

    Attributes:
        tokens: layer name to copies per global expert, int64 ``[E]`` on the CPU, in layer order.
        imbalance: layer name to max / mean of its copies; 1 is even, E is all to one expert, and
            1 where nothing was counted.
    """

    tokens: dict[str, torch.Tensor]
    imbalance: dict[str, float]

    @property
    def worst_imbalance(self) -> float:
        """The largest imbalance of any layer."""
        return max(self.imbalance.values(), default=1.0)


def expert_load(model: nn.Module, *, reset: bool = False) -> ExpertLoad:
    """Sum the experts' counters over all ranks.

    Args:
        model: a patched model, or its FSDP1 or DDP wrapper.
        reset: start counting anew afterwards.

    Raises:
        ValueError: no expert-parallel experts in the model.
        RuntimeError: a rank did not come within the time-out; the message names it.

    Collective over all ranks (one all-reduce of layers * E int64); syncs the host.
    """
    counters = _counters(model)
    if not counters:
        raise ValueError(NO_EXPERTS)
    meet("expert_load")
    tokens = sum_over_ranks(counters)
    if reset:
        reset_expert_load(model)
    imbalance = {name: imbalance_of(total.tolist()) for name, total in tokens.items()}
    return ExpertLoad(tokens, imbalance)


class RouterLosses(NamedTuple):
    """What the routers added to the gradient since the last reset: means over all ranks.

    Attributes:
        z_loss: router name to z loss, its coefficient included, per backward pass; 0 where none
            ran. The model's z loss is the sum over routers.
        aux_loss: the same of the load-balancing loss of routing="aux_loss".
        num_dropped: router name to copies dropped by the capacity factor, summed over all ranks
            and backward passes.
        dropped_share: the same as part of all copies.
    """

    z_loss: dict[str, float]
    aux_loss: dict[str, float]
    num_dropped: dict[str, int]
    dropped_share: dict[str, float]


def router_losses(model: nn.Module, *, reset: bool = False) -> RouterLosses:
    """Read what the routers counted, once per backward, over all ranks.

    Args:
        model: a patched model, or its FSDP1 or DDP wrapper.
        reset: start counting anew afterwards.

    Raises:
        ValueError: the model's routers are Hugging Face's own, which count nothing here.
        RuntimeError: a rank did not come within the time-out; the message names it.

    Collective over all ranks (one all-reduce of layers * 5 fp64); syncs the host.
    """
    routers = {name: router for s in states_of(model) for name, router in s.routers.items()}
    if not routers:
        raise ValueError(
            "the model's routers are Hugging Face's own and add no loss; choose routing, "
            "z_loss_coeff or capacity_factor in the MoEConfig of apply_expert_parallel."
        )
    meet("router_losses")
    sums = torch.stack([router.loss_sums for router in routers.values()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    if reset:
        for router in routers.values():
            router.loss_sums.zero_()
        _note_reset(model, "routers")
    rows = dict(zip(routers, sums.tolist(), strict=True))
    return RouterLosses(
        z_loss={name: z / max(1.0, passes) for name, (z, _, _, _, passes) in rows.items()},
        aux_loss={name: aux / max(1.0, passes) for name, (_, aux, _, _, passes) in rows.items()},
        num_dropped={name: int(dropped) for name, (_, _, dropped, _, _) in rows.items()},
        dropped_share={name: row[2] / max(1.0, row[3]) for name, row in rows.items()},
    )


class StageTraffic(NamedTuple):
    """Calls of one stage on one kind of process group since the last reset, of this rank.

    Attributes:
        group: the group's description: "mesh_ep" for the dimension "ep" of a mesh.
        stage: "plan", "dispatch", "combine", "dispatch backward" or "combine backward"; outside of
            the expert layers the operation, such as "all-gather" or "reduce-scatter".
        calls: collectives, sends and receives begun.
        bytes: of this rank's inputs to them.
        milliseconds: of the `timed_calls`. On a GPU what the calling stream gave for them, by two
            events; on a CPU from the call to the end of its wait.
        timed_calls: those whose end has been seen. Missing are the last step's on a GPU, those
            that nobody waited for, and those captured into a CUDA graph.
    """

    group: str
    stage: str
    calls: int
    bytes: int
    milliseconds: float
    timed_calls: int


def traffic(*, reset: bool = False) -> list[StageTraffic]:
    """Read what the process-group hooks (`torch_moe_ep.hooks`) of this process counted.

    Args:
        reset: start counting anew afterwards.

    Returns:
        One row a group's description and stage, sorted by both; groups of the same description
        (EP and FSDP make several) are added up. Empty while no group has hooks.

    Local to this rank; no host sync: GPU times are read a step late.
    """
    from torch_moe_ep import label

    if not label.is_enabled():
        return []
    from torch_moe_ep.hooks.library import native

    rows = [StageTraffic(*row) for row in native.stage_counts(None)]
    if reset:
        native.reset_stage_counts()
    return rows


class NodeTraffic(NamedTuple):
    """Bytes sent to other nodes since the last reset, forward and backward, summed over all ranks.

    Recomputation by activation checkpointing sends again and counts again.

    Attributes:
        row_bytes: layer name to bytes of hidden states and their gradients.
        other_bytes: layer name to bytes of expert ids, router weights and their gradients.
    """

    row_bytes: dict[str, int]
    other_bytes: dict[str, int]


def node_traffic(model: nn.Module, *, reset: bool = False) -> NodeTraffic:
    """Sum what the layers of a hierarchical transport sent between nodes.

    Args:
        model: a patched model, or its FSDP1 or DDP wrapper.
        reset: start counting anew afterwards.

    Raises:
        ValueError: no layer of the model uses transport="hierarchical".
        RuntimeError: a rank did not come within the time-out; the message names it.

    Collective over all ranks (one all-reduce of layers * 2 int64); syncs the host.
    """
    layers = {
        name: (experts, state.device)
        for state in states_of(model)
        for name, experts in state.experts.items()
        if experts.ranks_per_node
    }
    if not layers:
        raise ValueError(
            'no layer counts bytes between nodes; they do with transport="hierarchical" where the '
            "expert-parallel group spans nodes (or TORCH_MOE_EP_RANKS_PER_NODE says so)."
        )
    meet("node_traffic")
    device = next(iter(layers.values()))[1]
    sums = torch.stack([experts.bytes_between_nodes for experts, _ in layers.values()]).to(device)
    dist.all_reduce(sums)
    if reset:
        for experts, _ in layers.values():
            experts.bytes_between_nodes.zero_()
    rows = dict(zip(layers, sums.tolist(), strict=True))
    return NodeTraffic(
        row_bytes={name: row[0] for name, row in rows.items()},
        other_bytes={name: row[1] for name, row in rows.items()},
    )


def reset_expert_load(model: nn.Module) -> None:
    """Set this rank's counters to zero. Local, no host sync."""
    for counter in _counters(model).values():
        counter.zero_()
    _note_reset(model, "experts")


def _note_reset(model: nn.Module, kind: str) -> None:
    """Tell recorders, which take differences, that counting starts anew."""
    for state in states_of(model):
        state.num_resets[kind] += 1


def _counters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: experts.tokens_per_expert
        for state in states_of(model)
        for name, experts in state.experts.items()
    }


def imbalance_of(tokens: Sequence[float]) -> float:
    """Largest over mean of the copies per expert; 1 where there are none."""
    total = sum(tokens)
    return max(tokens) * len(tokens) / total if total > 0 else 1.0
