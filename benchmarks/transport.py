"""Rows between ranks: dispatch and combine against torch's own all-to-alls with the same bytes.

    python -m benchmarks.transport              # a rank for each GPU; one GPU: two ranks share it
    python -m benchmarks.transport --ranks 4    # CPU: gloo

Rank 0's figures, of rows that leave it: bytes over time each way, SMs (thread blocks of the widest
communication kernel), and the host's time for a call. The peer transport moves rows with as many
SMs as it is told. Ranks that share a GPU or a CPU talk over sockets, so their rows are marked "not
a speed" and show that everything runs. The dispatcher that gathers all tokens is there for its
bytes: it moves P T rows where all-to-all moves T K.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from benchmarks.routing import expert_ids
from torch_moe_ep import ops
from torch_moe_ep.gather_dispatch import gather_tokens, scatter_sums
from torch_moe_ep.testing import RankFailure, RankPool, share_the_gpu

PEER_SMS = (8, 16, 32)
PEER_KERNELS = ("push_rows", "pull_rows", "pull_elements")
MOVING_KERNELS = ("nccl", "allToAllV", *PEER_KERNELS)
NOT_A_SPEED = "not a speed: ranks share a device"


@dataclass(frozen=True)
class Case:
    """Tokens T of each rank, H, K, E and how many times each candidate runs."""

    tokens: int
    hidden: int
    top_k: int
    num_experts: int
    runs: int
    device_type: str
    has_own_gpu: bool

    def __str__(self) -> str:
        """The case as result files name it."""
        sizes = f"T={self.tokens} H={self.hidden} K={self.top_k} E={self.num_experts}"
        return sizes if self.has_own_gpu else f"{sizes} ({NOT_A_SPEED})"


@dataclass(frozen=True)
class Exchange:
    """Something that moves rows: what it does, and the bytes that leave this rank."""

    run: Callable[[], object]
    sent_bytes: int


def enter_rank(case: Case) -> torch.device:
    """The device of this rank; before the first collective."""
    return torch.device("cpu") if case.device_type == "cpu" else enter_gpu()


def enter_gpu() -> torch.device:
    """The GPU of this rank, its own or one that ranks share; before the first collective."""
    share_the_gpu()
    return torch.device("cuda", torch.cuda.current_device())


def exchanges_of(case: Case, device: torch.device) -> dict[str, Exchange | str]:
    """Name to exchange, or to why it cannot run here."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.randn(case.tokens, case.hidden, device=device).to(dtype)
    ids = expert_ids("even", case.tokens, case.num_experts, case.top_k).to(device)
    weights = torch.rand(case.tokens, case.top_k, device=device)
    plan = ops.plan(ids, case.num_experts, group_name=group.group_name)
    rows, _ = ops.dispatch(x, None, plan)
    row_bytes = case.hidden * x.element_size()
    sent = plan.host_counts[rank].view(world, -1).sum(dim=1).tolist()
    received = plan.host_counts.view(world, world, -1).sum(dim=2)[:, rank].tolist()
    away = (sum(sent) - sent[rank]) * row_bytes
    home = (sum(received) - received[rank]) * row_bytes
    buffer = torch.randn(sum(sent), case.hidden, device=device).to(dtype)
    output = buffer.new_empty(sum(received), case.hidden)

    def gathered() -> None:
        tokens, _, _ = gather_tokens(x, ids, weights, case.num_experts, group)
        scatter_sums(tokens, group)

    peers = peer_exchanges(case, x, ids, away, home) if device.type == "cuda" else {}
    return {
        **peers,
        "torch_moe_ep dispatch, collective": Exchange(lambda: ops.dispatch(x, None, plan), away),
        "torch_moe_ep combine, collective": Exchange(lambda: ops.combine(rows, plan), home),
        "torch_moe_ep all-gather dispatcher, there and back": Exchange(
            gathered, (world - 1) * case.tokens * row_bytes * (1 + 4 // x.element_size())
        ),
        "torch all_to_all_single": Exchange(
            lambda: dist.all_to_all_single(output, buffer, received, sent), away
        ),
    }


VDEV = "torch all_to_all_vdev"


def vdev_exchanges_of(case: Case, device: torch.device) -> dict[str, Exchange | str]:
    """Torch's symmetric-memory all-to-all with the same bytes, in processes of its own.

    It wants another backend of symmetric memory than the peer transport, and a process has one.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if device.type != "cuda":
        return {VDEV: "needs CUDA"}
    ids = expert_ids("even", case.tokens, case.num_experts, case.top_k)
    owners = ids.flatten() // (case.num_experts // world)
    sent = owners.bincount(minlength=world).tolist()
    buffer = torch.randn(sum(sent), case.hidden, device=device).to(torch.bfloat16)
    away = (sum(sent) - sent[rank]) * case.hidden * buffer.element_size()
    return {VDEV: vdev_exchange(buffer, sent, away)}


def peer_exchanges(
    case: Case, x: torch.Tensor, ids: torch.Tensor, away: int, home: int
) -> dict[str, Exchange | str]:
    """Dispatch and combine over peer memory, by the number of SMs that move rows."""
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, Exchange | str] = {}
    for num_sms in PEER_SMS:
        name = f"peer, {num_sms} SMs"
        try:
            plan = ops.peer_plan(
                ids, case.num_experts, group_name=group.group_name, num_sms=num_sms
            )
            rows, _ = ops.peer_dispatch(x, None, plan)
            torch.cuda.synchronize()
        except RuntimeError as error:
            found[f"torch_moe_ep {name}"] = str(error).strip().splitlines()[0][:200]
            continue
        found[f"torch_moe_ep dispatch, {name}"] = Exchange(
            partial(ops.peer_dispatch, x, None, plan), away
        )
        found[f"torch_moe_ep dispatch, {name}, rows left in the buffer"] = Exchange(
            partial(ops.peer_dispatch, x, None, plan, keep=False), away
        )
        found[f"torch_moe_ep combine, {name}"] = Exchange(
            partial(ops.peer_combine, rows, plan), home
        )
    return found


def vdev_exchange(buffer: torch.Tensor, sent: list[int], away: int) -> Exchange | str:
    """Torch's symmetric-memory all-to-all with splits on the device; it is NVSHMEM's."""
    from torch.distributed import _symmetric_memory as symmetric

    if not symmetric.is_nvshmem_available():
        return "this torch finds no NVSHMEM"
    try:
        group = dist.group.WORLD
        assert group is not None
        symmetric.set_backend("NVSHMEM")
        world = dist.get_world_size()
        # Room for every rank's rows: the operator writes what comes.
        room = (buffer.size(0) * 2, buffer.size(1))
        source = symmetric.empty(room, dtype=buffer.dtype, device=buffer.device)
        target = symmetric.empty(room, dtype=buffer.dtype, device=buffer.device)
        splits = symmetric.empty(world, dtype=torch.int64, device=buffer.device)
        found = symmetric.empty((2, world), dtype=torch.int64, device=buffer.device)
        for tensor in (source, target, splits, found):
            symmetric.rendezvous(tensor, group)
        splits.copy_(torch.tensor(sent))
        name = group.group_name
        run = torch.ops.symm_mem.all_to_all_vdev
        run(source, target, splits, found, name)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0][:200]
    return Exchange(lambda: run(source, target, splits, found, name), away)


Exchanges = Callable[[Case, torch.device], dict[str, Exchange | str]]


def measure(case: Case, exchanges: Exchanges = exchanges_of) -> list[dict[str, Any]]:
    """This rank's rows of the result file."""
    device = enter_rank(case)
    found = []
    for name, exchange in exchanges(case, device).items():
        if isinstance(exchange, str):
            found.append({"name": name, "value": f"did not run: {exchange}", "unit": "reason"})
            continue
        seconds, host_seconds = timed(exchange.run, case.runs, device)
        rate = exchange.sent_bytes / seconds / 1e9
        found += [
            {"name": name, "value": round(rate, 3), "unit": "GB/s sent"},
            {"name": name, "value": exchange.sent_bytes, "unit": "bytes sent"},
            {"name": name, "value": round(host_seconds * 1e6, 1), "unit": "us of the host a call"},
        ]
        if device.type == "cuda":
            blocks, kernel_seconds = moving_kernel(exchange.run)
            if blocks == 0:
                continue
            kernel_rate = exchange.sent_bytes / kernel_seconds / 1e9
            found += [
                {"name": name, "value": blocks, "unit": "SMs"},
                {"name": name, "value": round(kernel_rate, 3), "unit": "GB/s sent, kernel alone"},
            ]
    return [{**row, "case": f"P={dist.get_world_size()} {case}"} for row in found]


def vdev_rows(case: Case, num_ranks: int) -> list[dict[str, Any]]:
    """Rows of `vdev_exchanges_of`; NVSHMEM ends the process where it does not like the GPUs."""
    try:
        with RankPool(num_ranks, backend="gloo" if case.device_type == "cpu" else "nccl") as pool:
            rows: list[dict[str, Any]] = pool.run(measure, case, vdev_exchanges_of, timeout_s=60)[0]
            return rows
    except RankFailure as failure:
        reason = str(failure).strip().splitlines()[-1]
        row = {"name": VDEV, "value": f"did not run: {reason}", "unit": "reason"}
        return [{**row, "case": f"P={num_ranks} {case}"}]


def timed(run: Callable[[], object], runs: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a call until its rows are there, and until the host has them issued."""
    for _ in range(2):
        run()
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(runs):
        run()
    issued = time.perf_counter() - start
    synchronize(device)
    return (time.perf_counter() - start) / runs, issued / runs


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def moving_kernel(run: Callable[[], object]) -> tuple[int, float]:
    """Thread blocks of the widest communication kernel of a call, each of which holds an SM.

    And the seconds of all of them: the ranks meet first, so that they wait for nobody. Zeros where
    no kernel of a known name ran.
    """
    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in common.trace_events(profiled)
        if event.get("cat") == "kernel" and any(name in event["name"] for name in MOVING_KERNELS)
    ]
    blocks = max((event["args"]["grid"][0] for event in kernels), default=0)
    return blocks, sum(event["dur"] for event in kernels) * 1e-6


def main() -> None:
    """Run the ranks and keep the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    num_gpus = torch.cuda.device_count()
    parser.add_argument("--ranks", type=int, default=num_gpus if num_gpus > 1 else 2)
    parser.add_argument("--tokens", type=int, default=16384 if num_gpus > 1 else 1024)
    parser.add_argument("--hidden", type=int, default=4096 if num_gpus else 1024)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--runs", type=int, default=50 if num_gpus > 1 else 5)
    common.add_output_arguments(parser)
    arguments = parser.parse_args()
    device_type = "cuda" if num_gpus else "cpu"
    sizes = (arguments.tokens, arguments.hidden, arguments.top_k, arguments.num_experts)
    case = Case(*sizes, arguments.runs, device_type, has_own_gpu=num_gpus >= arguments.ranks)
    with RankPool(arguments.ranks, backend="nccl" if num_gpus else "gloo") as pool:
        rows = pool.run(measure, case, timeout_s=300)[0]
    rows += vdev_rows(case, arguments.ranks)
    common.finish("transport", rows, arguments)


if __name__ == "__main__":
    main()
