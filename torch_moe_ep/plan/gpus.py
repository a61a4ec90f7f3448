"""The numbers of the GPUs that are planned for, each with its source.

Memory is what torch reports as the card's capacity. Rates of a link are of one direction and of
one GPU. The network is that of the cloud machine with 8 of these GPUs that is named; another one is
given with ``--network``.
"""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as given on the command line.
        memory: bytes that torch reports.
        matmul: FLOP/s of a dense bf16 matrix product, sustained.
        copy: bytes/s read plus written by a copy on the device.
        nvlink: bytes/s to the other GPUs of its node.
        network: bytes/s to other nodes.
        host: bytes/s to pinned host memory.
        host_memory: bytes of the machine's memory for each of its GPUs.
        sources: of each number, by name.
    """

    name: str
    memory: float
    matmul: float
    copy: float
    nvlink: float
    network: float
    host: float
    host_memory: float
    sources: dict[str, str]


_NVLINK3 = "NVLink 3: 12 links, 600 GB/s both ways (NVIDIA A100 data sheet)"
_NVLINK4 = "NVLink 4: 18 links, 900 GB/s both ways (NVIDIA H100 and H200 data sheets)"
_CAPACITY = "capacity in torch's out-of-memory messages"
_A100_MATMUL = "80 % of 312 TFLOP/s (NVIDIA A100 data sheet); not measured here"
_COPY = "87 % of the data sheet's bandwidth, the share measured on an H200; not measured here"
_PCIE4 = "80 % of PCIe 4.0 x16, 32 GB/s; not measured here"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "a100-40gb",
            39.5 * GIB, 250e12, 1.35e12, 300e9, 6.25e9, 25e9, 144 * GIB,
            {
                "memory": _CAPACITY,
                "matmul": _A100_MATMUL,
                "copy": _COPY,
                "nvlink": _NVLINK3,
                "network": "p4d.24xlarge: 400 Gbit/s for 8 GPUs (AWS)",
                "host_memory": "p4d.24xlarge: 1152 GiB for 8 GPUs (AWS)",
                "host": _PCIE4,
            },
        ),
        Gpu(
            "a100-80gb",
            79.25 * GIB, 250e12, 1.77e12, 300e9, 6.25e9, 25e9, 144 * GIB,
            {
                "memory": _CAPACITY,
                "matmul": _A100_MATMUL,
                "copy": _COPY,
                "nvlink": _NVLINK3,
                "network": "p4de.24xlarge: 400 Gbit/s for 8 GPUs (AWS)",
                "host_memory": "p4de.24xlarge: 1152 GiB for 8 GPUs (AWS)",
                "host": _PCIE4,
            },
        ),
        Gpu(
            "h100-80gb",
            79.1 * GIB, 640e12, 2.9e12, 450e9, 50e9, 48e9, 256 * GIB,
            {
                "memory": _CAPACITY,
                "matmul": "the rate measured on an H200, the same chip at the same 700 W",
                "copy": _COPY,
                "nvlink": _NVLINK4,
                "network": "p5.48xlarge: 3200 Gbit/s for 8 GPUs (AWS)",
                "host_memory": "p5.48xlarge: 2048 GiB for 8 GPUs (AWS)",
                "host": "the rate measured on an H200, also PCIe 5.0 x16",
            },
        ),
        Gpu(
            "h200-141gb",
            139.0 * GIB, 640e12, 4.16e12, 450e9, 50e9, 48e9, 256 * GIB,
            {
                "memory": "1 % below nvidia-smi's 143771 MiB; not read from torch here",
                "matmul": "dense GEMM in benchmarks/results/2026-11-25-layer.json: 641 TFLOP/s",
                "copy": "copy in benchmarks/results/2026-11-25-movement.json: 4155 GB/s",
                "nvlink": _NVLINK4,
                "network": "p5en.48xlarge: 3200 Gbit/s for 8 GPUs (AWS)",
                "host_memory": "p5en.48xlarge: 2048 GiB for 8 GPUs (AWS)",
                "host": "activations moved in benchmarks/results/2026-11-25-offload.json",
            },
        ),
    )
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU of a name in any case.

    Raises:
        ValueError: none has that name.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name}.")
    return gpu
