"""In which order a layer's communication and computation are launched under FSDP2.

    python -m benchmarks.launch_order --plot docs/launch-order.png   # one GPU, two ranks on it
    python -m benchmarks.launch_order --num_chunks 3                 # tokens in chunks

Two ranks share the GPU and talk over sockets, so the order of launches means something and their
durations do not. A forward of a small Mixtral under FSDP2 with P = 2 is profiled; every kernel is
assigned to a lane by its stream and drawn where the host launched it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks import common
from torch_moe_ep import MoEConfig, apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import RankPool, batch_of, share_the_gpu, tiny_mixtral
from torch_moe_ep.testing.parallel import wrap

EXPERTS = "EP communicator"
SHARDS = "FSDP communicator"
COMPUTE = "compute"
OTHER = "copies of FSDP"
LANES = (COMPUTE, EXPERTS, SHARDS, OTHER)


@dataclass(frozen=True)
class Launch:
    """A kernel: its name, lane and stream, and when the host launched it, in microseconds."""

    name: str
    lane: str
    stream: int
    launched_us: float


def launches_of(profiled: profile) -> list[Launch]:
    """Every kernel of the profile in the order of the host's launches."""
    events = common.trace_events(profiled)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and "correlation" in event.get("args", {})
    }
    lane_of_stream = _lanes(kernels)
    found = [
        Launch(
            kernel["name"],
            lane_of_stream[kernel["args"]["stream"]],
            kernel["args"]["stream"],
            launched[kernel["args"]["correlation"]],
        )
        for kernel in kernels
        if kernel["args"]["correlation"] in launched
    ]
    return sorted(found, key=lambda launch: launch.launched_us)


def _lanes(kernels: list[dict[str, Any]]) -> dict[int, str]:
    """Streams by what runs on them: the EP group alone sends rows, FSDP alone gathers besides."""
    names: dict[int, set[str]] = {}
    for kernel in kernels:
        names.setdefault(kernel["args"]["stream"], set()).add(kernel["name"])
    lanes = {}
    for stream, found in names.items():
        if any("SendRecv" in name for name in found):
            lanes[stream] = EXPERTS
        elif any(name.startswith("nccl") for name in found):
            lanes[stream] = SHARDS
        elif any("pack_rows" in name for name in found):
            lanes[stream] = COMPUTE
        else:
            lanes[stream] = OTHER
    return lanes


def profiled_forward(layers: int, num_chunks: int) -> list[Launch]:
    """Launches of this rank in the third forward of a small model."""
    rank = share_the_gpu()
    mesh = init_device_mesh("cuda", 2)
    model = tiny_mixtral(num_hidden_layers=layers, hidden_size=256, intermediate_size=512)
    config = MoEConfig(transport="collective", num_chunks=num_chunks)
    model = wrap(apply_expert_parallel(model.cuda(), mesh, config), "fsdp2", mesh)
    batch = {key: value.cuda() for key, value in batch_of(rank, tokens=512).items()}
    for _ in range(2):
        model(**batch).loss.backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        model(**batch)
        torch.cuda.synchronize()
    dist.barrier()
    return launches_of(profiled)


def forward_on_two_ranks(layers: int = 3, num_chunks: int = 1) -> list[Launch]:
    """Launches of rank 0 of two ranks that share the GPU."""
    with RankPool(2, backend="nccl") as pool:
        found: list[Launch] = pool.run(profiled_forward, layers, num_chunks, timeout_s=120)[0]
    return found


def gathers_before_rows(launches: list[Launch]) -> list[int]:
    """For each exchange of rows, how many all-gathers of FSDP were launched before it."""
    counts, num_gathers = [], 0
    for launch in launches:
        if launch.lane == SHARDS and "AllGather" in launch.name:
            num_gathers += 1
        elif launch.lane == EXPERTS and "SendRecv" in launch.name:
            counts.append(num_gathers)
    return counts


def draw(launches: list[Launch], path: Path) -> None:
    """One lane for each kind of stream, a mark for each launch."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(12, 2.6))
    start = launches[0].launched_us
    for row, lane in enumerate(LANES):
        times = [(it.launched_us - start) / 1e3 for it in launches if it.lane == lane]
        axis.plot(times, [row] * len(times), "|", markersize=16)
    for launch in launches:
        if "SendRecv" in launch.name:
            axis.axvline((launch.launched_us - start) / 1e3, color="0.8", zorder=0)
    axis.set_yticks(range(len(LANES)), LANES)
    axis.set_xlabel("launched by the host, ms (order matters, not time); grey: exchanges of rows")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Print the launches of one forward and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    parser.add_argument("--num_chunks", type=int, default=1, help="MoEConfig.num_chunks")
    arguments = parser.parse_args()
    launches = forward_on_two_ranks(num_chunks=arguments.num_chunks)
    for launch in launches:
        is_ours = "pack_rows" in launch.name or "swiglu" in launch.name
        if launch.lane in (EXPERTS, SHARDS) or is_ours:
            print(f"{launch.launched_us - launches[0].launched_us:10.1f} us  {launch.lane:20s}"
                  f"{launch.name[:60]}")  # fmt: skip
    if arguments.plot:
        draw(launches, arguments.plot)


if __name__ == "__main__":
    main()
