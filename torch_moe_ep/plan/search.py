"""All layouts judged, and the one to take."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch_moe_ep.plan.gpus import GIB, Gpu
from torch_moe_ep.plan.layout import PRECISIONS, Batch, Layout, layouts
from torch_moe_ep.plan.memory import Memory, memory_of
from torch_moe_ep.plan.shape import ModelShape
from torch_moe_ep.plan.speed import Speed, speed_of
from torch_moe_ep.plan.traffic import Traffic, traffic_of
from torch_moe_ep.plan.weights import num_parameters, weights_of

CONTEXT = 2 * GIB  # CUDA's context, libraries and NCCL's buffers
FRAGMENTS = 0.05  # of the card, lost to the allocator
HOST_SHARE = 0.9  # of the host's memory that may be pinned


@dataclass(frozen=True)
class Plan:
    """A layout with what it needs and gives.

    Attributes:
        layout: which.
        memory: at its peak.
        traffic: of a step.
        speed: of a step.
        fits: whether the peak is within what a GPU can give, and the host.
    """

    layout: Layout
    memory: Memory
    traffic: Traffic
    speed: Speed
    fits: bool


def usable(gpu: Gpu) -> int:
    """Bytes that tensors can have of a GPU."""
    return int(gpu.memory * (1 - FRAGMENTS) - CONTEXT)


def plan(
    model: ModelShape, gpu: Gpu, gpus: int, nodes: int, batch: Batch, precisions: Sequence[str]
) -> list[Plan]:
    """Judge every layout that divides.

    Args:
        model: its numbers.
        gpu: its numbers.
        gpus: W, all GPUs.
        nodes: machines with as many GPUs each.
        batch: of a rank.
        precisions: names of PRECISIONS.

    Raises:
        ValueError: a number below 1, or nodes do not divide gpus.
    """
    numbers = {"gpus": gpus, "nodes": nodes, "sequence": batch.sequence, "batch": batch.samples}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if gpus % nodes:
        raise ValueError(f"nodes must divide gpus: {nodes} does not divide {gpus}.")
    return [
        judge(model, layout, batch, gpu)
        for name in precisions
        for layout in layouts(model, gpus, nodes, PRECISIONS[name])
    ]


def judge(model: ModelShape, layout: Layout, batch: Batch, gpu: Gpu) -> Plan:
    """Judge one layout."""
    memory = memory_of(model, layout, batch)
    return Plan(
        layout,
        memory,
        traffic_of(model, layout, batch),
        speed_of(model, layout, batch, gpu),
        memory.total <= usable(gpu) and memory.host <= HOST_SHARE * gpu.host_memory,
    )


def recommend(plans: Sequence[Plan]) -> Plan | None:
    """The fastest that fits at its slow end; of those within 2 % the one that needs least memory.

    fp32 states are taken over bf16 ones wherever they fit on the GPUs: AdamW on bf16 weights loses
    small updates.
    """
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return None
    first = min(_rank(p.layout) for p in fitting)
    found = [p for p in fitting if _rank(p.layout) == first]
    best = max(p.speed.low for p in found)
    near = [p for p in found if p.speed.low >= 0.98 * best]
    return min(near, key=lambda p: p.memory.total)


def reason(model: ModelShape, plans: Sequence[Plan], chosen: Plan | None, gpu: Gpu) -> str:
    """One sentence: why this one, or why none."""
    if chosen is None:
        return f"Nothing fits: {_shortage(plans, gpu)}; take more GPUs or fewer tokens a GPU."
    peers = [p for p in plans if p.fits and _rank(p.layout) == _rank(chosen.layout)]
    is_fastest = chosen.speed.low == max(p.speed.low for p in peers)
    what = "is the fastest" if is_fastest else "needs least of those within 2 % of the fastest"
    why = f"it {what} of the {len(peers)} layouts with {_states(chosen.layout)} that fit"
    better = [p for p in plans if _rank(p.layout) < _rank(chosen.layout)]
    if better:
        layout = better[0].layout
        per_parameter = layout.precision.per_parameter
        total = num_parameters(weights_of(model)) * per_parameter / GIB
        return (
            f"Because {_states(layout)}, {per_parameter} bytes a parameter and {total:,.0f} GiB in "
            f"all, do not fit ({_shortage(better, gpu)}), and {why}."
        )
    if any(p.fits and p.speed.low > chosen.speed.low for p in plans if p not in peers):
        why += "; others are faster with states that lose small updates"
    return f"Because {why}."


def _states(layout: Layout) -> str:
    where = "the host" if layout.offload == "parameters" else "the GPUs"
    return f"{layout.precision.what.split()[0]} states on {where}"


def _rank(layout: Layout) -> tuple[bool, int]:
    """The order in which `recommend` looks at layouts: on the GPUs first, fp32 states first."""
    return layout.offload == "parameters", list(PRECISIONS).index(layout.precision.name)


def _shortage(plans: Sequence[Plan], gpu: Gpu) -> str:
    least = min((p.memory for p in plans), key=lambda memory: memory.total)
    needed = f"{least.total / GIB:.1f} GiB of {usable(gpu) / GIB:.1f} a GPU"
    if least.host > HOST_SHARE * gpu.host_memory:
        pinned = HOST_SHARE * gpu.host_memory / GIB
        needed += f", and {least.host / GIB:,.0f} GiB of {pinned:,.0f} of the host"
    return f"the leanest needs {needed}"
