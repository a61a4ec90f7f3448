"""The experts module over all ranks, forward + backward, every GPU at work at once.

    python -m benchmarks.ep_layer                # EP = a rank for each GPU; one GPU: two share it
    python -m benchmarks.ep_layer --chunks 1 4   # tokens in one piece, and in four
    python -m benchmarks.ep_layer --fine_grained # 128 narrow experts, of which a token takes eight

Each rank has T tokens and E / P experts. The figure is that of the slowest rank, as a ratio to the
dense GEMM of the same loop, which runs on every GPU too. Beside it: the same layer with all experts
on one GPU (P = 1), the milliseconds by which the P ranks' layer is slower than it (what
communication leaves exposed, and what imbalance costs), the imbalance (rows of the fullest rank
over the mean), and the host's waits. Ranks that share a GPU talk over sockets: "not a speed".
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import common
from benchmarks.layer import Case, Inputs, launches, make_inputs, our_experts
from benchmarks.transport import NOT_A_SPEED, enter_gpu
from torch_moe_ep.config import MoEConfig
from torch_moe_ep.testing import RankPool

ALONE = "torch_moe_ep P=1"
ROUTINGS = ("even", "1/i")


@dataclass(frozen=True)
class Settings:
    """What a rank needs to know."""

    cases: tuple[Case, ...]
    transports: tuple[str, ...]
    chunks: tuple[int, ...]
    min_seconds: float
    turns: int
    has_own_gpu: bool


@dataclass(frozen=True)
class Measured:
    """One rank's part of a case: rates of every candidate, rows received, launches, host waits."""

    timings: list[tuple[str, tuple[float, ...], int]]
    rows: int
    counts: dict[str, tuple[int, int]]


def expert_parallel_layer(case: Case, inputs: Inputs, config: MoEConfig) -> nn.Module:
    """The experts module of this rank, as `apply_expert_parallel` makes it over all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    num_local = case.num_experts // world
    own = slice(rank * num_local, (rank + 1) * num_local)
    module = our_experts(case, inputs)
    for name in ("gate_up_proj", "down_proj"):
        local = getattr(module, name).detach()[own].clone()
        setattr(module, name, nn.Parameter(local))
    group = dist.group.WORLD
    assert group is not None
    setup: Any = module.setup_expert_parallel
    setup(
        ep_group_name=group.group_name,
        num_experts=case.num_experts,
        weight_grad_scale=1 / world,
        config=config,
        device=inputs.x.device,
        uses_peers=config.transport == "peer",
    )
    return module


def layers_of(
    case: Case, inputs: Inputs, settings: Settings
) -> dict[str, tuple[nn.Module, Inputs]]:
    """Name to module and its inputs; the weights of `inputs` are the module's own."""
    found = {ALONE: (our_experts(case, inputs), inputs)}
    for name, config in configs_of(settings).items():
        module = expert_parallel_layer(case, inputs, config)
        own = replace(inputs, gate_up=module.gate_up_proj, down=module.down_proj)
        found[f"torch_moe_ep P={dist.get_world_size()} {name}"] = (module, own)
    return found


def configs_of(settings: Settings) -> dict[str, MoEConfig]:
    """Name to configuration: every transport, peer with both budgets, in every number of chunks."""
    found = {}
    for transport in settings.transports:
        for budget in ("exact", "bounded") if transport == "peer" else ("",):
            for num_chunks in settings.chunks:
                name = f"{transport}, {budget}" if budget else transport
                pieces = f", {num_chunks} chunks" if num_chunks > 1 else ""
                config = MoEConfig(
                    transport=transport, num_chunks=num_chunks, budget=budget or "exact"
                )
                found[name + pieces] = config
    return found


def measure(settings: Settings) -> list[Measured]:
    """This rank's part of every case."""
    device = enter_gpu()
    return [measure_case(case, settings, device) for case in settings.cases]


def measure_case(case: Case, settings: Settings, device: torch.device) -> Measured:
    """Time the candidates of one case together with the other ranks."""
    inputs = make_inputs(case, device, torch.bfloat16)
    layers = layers_of(case, inputs, settings)
    candidates = [common.dense_gemm(device, torch.bfloat16)]
    candidates += [
        common.Candidate(name, partial(own.gradients_of, module), case.flops)
        for name, (module, own) in layers.items()
    ]
    timings = common.time_turn_about(
        candidates,
        device,
        min_seconds=settings.min_seconds,
        turns=settings.turns,
        group=dist.group.WORLD,
    )
    num_local = case.num_experts // dist.get_world_size()
    counts = torch.bincount(inputs.ids.flatten(), minlength=case.num_experts)
    dist.all_reduce(counts)
    rows = int(counts.view(-1, num_local).sum(dim=1)[dist.get_rank()])
    return Measured(
        [(t.candidate.name, t.rates, t.runs) for t in timings],
        rows,
        {name: launches(own, module) for name, (module, own) in layers.items()},
    )


def rows_of(case: Case, settings: Settings, ranks: list[Measured]) -> list[dict[str, Any]]:
    """The result rows of one case from all ranks' parts."""
    work = {common.DENSE: 2.0 * 8192**3}
    timings = common.slowest(
        [
            [
                common.Timing(common.Candidate(name, list, work.get(name, case.flops)), rates, runs)
                for name, rates, runs in rank.timings
            ]
            for rank in ranks
        ]
    )
    label = f"P={len(ranks)} {case}" + ("" if settings.has_own_gpu else f" ({NOT_A_SPEED})")
    rows = common.speed_rows(timings, label, "TFLOP/s a GPU", 1e12)
    seconds = {t.candidate.name: case.flops / t.rate for t in timings}
    for name, (num_launches, host_waits) in ranks[0].counts.items():
        base = {"name": name, "case": label}
        if name != ALONE:
            exposed = (seconds[name] - seconds[ALONE]) * 1e3
            rows.append({**base, "value": round(exposed, 3), "unit": "ms slower than P=1"})
        rows.append({**base, "value": num_launches, "unit": "launches"})
        rows.append({**base, "value": host_waits, "unit": "host syncs"})
    received = [rank.rows for rank in ranks]
    imbalance = max(received) * len(received) / sum(received)
    what = "rows of the fullest rank over the mean"
    rows.append({"name": "routing", "case": label, "value": round(imbalance, 3), "unit": what})
    return rows


def main() -> None:
    """Run the ranks and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_common_arguments(parser)
    num_gpus = torch.cuda.device_count()
    small = {} if num_gpus > 1 else {"hidden": 1024, "width": 2048}
    fine_grained = {"num_experts": 128, "top_k": 8, "hidden": 2048, "width": 768}
    parser.add_argument("--ranks", type=int, default=num_gpus if num_gpus > 1 else 2)
    parser.add_argument("--tokens", type=int, default=16384 if num_gpus > 1 else 512)
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--transports", nargs="+", default=["collective", "peer"])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--fine_grained", action="store_true", help=f"experts as {fine_grained}")
    arguments = parser.parse_args()
    if num_gpus == 0:
        parser.error("benchmarks.ep_layer needs a GPU, and no GPU is visible.")
    shape = fine_grained if arguments.fine_grained else small
    settings = Settings(
        tuple(Case(arguments.tokens, routing, **shape) for routing in arguments.routings),
        tuple(arguments.transports),
        tuple(arguments.chunks),
        arguments.min_seconds,
        arguments.turns,
        has_own_gpu=num_gpus >= arguments.ranks,
    )
    with RankPool(arguments.ranks, backend="nccl") as pool:
        by_rank = pool.run(measure, settings, timeout_s=600)
    rows: list[dict[str, Any]] = []
    for case, ranks in zip(settings.cases, zip(*by_rank, strict=True), strict=True):
        rows += rows_of(case, settings, list(ranks))
    common.finish("ep_layer", rows, arguments)


if __name__ == "__main__":
    main()
