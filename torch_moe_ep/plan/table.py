"""Plans as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch_moe_ep.plan.gpus import GIB, Gpu
from torch_moe_ep.plan.layout import OFFLOAD, PRECISIONS, Batch
from torch_moe_ep.plan.search import Plan, reason, recommend, usable
from torch_moe_ep.plan.shape import ModelShape
from torch_moe_ep.plan.weights import num_parameters, weights_of

GB = 1e9
COLUMNS = (
    *("P", "S", "rep", "states", "checkpointing", "offload"),
    *("param", "grad", "optim", "activ", "buffer", "gather", "total", "fits"),
    *("NVLink", "network", "tokens/s"),
)


def as_text(
    model: ModelShape, gpu: Gpu, batch: Batch, plans: Sequence[Plan], *, show_all: bool = False
) -> str:
    """What is printed: the best choice of every grid, or all; what fits; what to take, and why."""
    shown = list(plans) if show_all else best_of_grids(plans)
    return "\n".join(
        [
            *_head(model, gpu, batch, plans),
            "",
            "GiB a GPU at the peak of a step; GB that a GPU sends in a step; tokens/s of all GPUs",
            *_columns([COLUMNS, *(_cells(p) for p in shown)]),
            "",
            *_fitting(plans),
            "",
            *_advice(model, gpu, plans),
        ]
    )


def best_of_grids(plans: Sequence[Plan]) -> list[Plan]:
    """For each (P, S, replicate) what is recommended of it, else its leanest."""
    grids: dict[tuple[int, int], list[Plan]] = {}
    for one in plans:
        grids.setdefault((one.layout.ep, one.layout.shard), []).append(one)
    return [recommend(some) or min(some, key=lambda p: p.memory.total) for some in grids.values()]


def _head(model: ModelShape, gpu: Gpu, batch: Batch, plans: Sequence[Plan]) -> list[str]:
    weights, layout = weights_of(model), plans[0].layout
    total, experts = num_parameters(weights), num_parameters(weights, "expert")
    nodes = f"{layout.nodes} node{'s' if layout.nodes > 1 else ''}"
    return [
        f"{model.name}: {total / 1e9:.2f} billion parameters, {experts / 1e9:.2f} in experts",
        (
            f"{layout.world} x {gpu.name} on {nodes}: {usable(gpu) / GIB:.1f} GiB of "
            f"{gpu.memory / GIB:.1f} a GPU for tensors, {batch.tokens} tokens a GPU and step"
        ),
    ]


def _cells(one: Plan) -> tuple[str, ...]:
    layout, memory, traffic = one.layout, one.memory, one.traffic
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations)
    sent = traffic.rows + traffic.weights
    return (
        *(str(size) for size in (layout.ep, layout.shard, layout.replicate)),
        *(layout.precision.name, layout.checkpointing, layout.offload),
        *(f"{p / GIB:.1f}" for p in (*parts, memory.buffers, memory.gathered, memory.total)),
        "yes" if one.fits else "no",
        f"{sent.nvlink / GB:.1f}",
        f"{sent.network / GB:.1f}",
        _range(one),
    )


def _range(one: Plan) -> str:
    return f"{_rounded(one.speed.low):,}-{_rounded(one.speed.high):,}"


def _rounded(number: float) -> int:
    """Three digits.

    >>> _rounded(123456.0)
    123000
    """
    return int(float(f"{number:.3g}"))


def _fitting(plans: Sequence[Plan]) -> list[str]:
    """A row for each precision and offload: how many layouts fit, and the best of them."""
    rows: list[tuple[str, ...]] = [
        ("states", "bytes/param", "offload", "fit", "best P, S", "host GiB/node", "tokens/s")
    ]
    for precision in PRECISIONS.values():
        for offload in OFFLOAD:
            some = [p for p in plans if (p.layout.precision, p.layout.offload) ==
                    (precision, offload)]  # fmt: skip
            if not some:
                continue
            best = recommend(some)
            row = (precision.name, str(precision.per_parameter), offload)
            counted = f"{sum(p.fits for p in some)} of {len(some)}"
            rows.append((*row, counted, *(_best_cells(best) if best else ("", "", ""))))
    return _columns(rows)


def _best_cells(best: Plan) -> tuple[str, str, str]:
    layout = best.layout
    host = best.memory.host * layout.world / layout.nodes / GIB
    return f"{layout.ep}, {layout.shard}", f"{host:,.0f}", _range(best)


def _advice(model: ModelShape, gpu: Gpu, plans: Sequence[Plan]) -> list[str]:
    chosen = recommend(plans)
    why = reason(model, plans, chosen, gpu)
    if chosen is None:
        return [why]
    layout = chosen.layout
    return [
        (
            f"Take expert_parallel_degree={layout.ep}, hybrid_shard_degree={layout.shard}, "
            f"{layout.precision.what}, checkpointing: {layout.checkpointing}, offload: "
            f"{layout.offload}."
        ),
        why,
    ]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines; words to the left, numbers to the right."""
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]
    words = [all(not row[idx][:1].isdigit() for row in rows[1:]) for idx in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if is_word else cell.rjust(width)
            for cell, width, is_word in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in rows
    ]


def as_json(model: ModelShape, gpu: Gpu, batch: Batch, plans: Sequence[Plan]) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    chosen = recommend(plans)
    return {
        "model": asdict(model),
        "parameters": num_parameters(weights_of(model)),
        "gpu": asdict(gpu),
        "usable_bytes": usable(gpu),
        "batch": asdict(batch),
        "plans": [_as_dict(one) for one in plans],
        "recommended": None if chosen is None else _as_dict(chosen),
        "reason": reason(model, plans, chosen, gpu),
    }


def _as_dict(one: Plan) -> dict[str, Any]:
    return {
        "layout": {**asdict(one.layout), "precision": one.layout.precision.name},
        "fits": one.fits,
        "memory": {**asdict(one.memory), "total": one.memory.total},
        "traffic": asdict(one.traffic),
        "speed": asdict(one.speed),
    }
