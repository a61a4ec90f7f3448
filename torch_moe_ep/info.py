"""Says what is installed, how it was built, and what this machine can use of it.

``python -m torch_moe_ep.info`` prints it for people, ``--json`` for programs. It works with a
library that does not load, too, and says why. ``--models`` lists the experts classes of the
installed transformers instead: which can be made expert-parallel, and why the others cannot.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed

from torch_moe_ep._build_info import (
    BuildInfo,
    hooks_path,
    library_path,
    read_build_info,
    why_hooks_unusable,
    why_unusable,
)
from torch_moe_ep.integrations.families import ExpertsClass, find_experts_classes

PACKAGES = ("torch_moe_ep", "torch", "transformers", "accelerate", "safetensors", "numpy")
CPU_KERNELS = "packed panels with AVX2 or AVX-512 for float32, else BLAS per expert"
NO_LIBRARY = "there is no library for this torch"


@dataclass(frozen=True)
class Choice:
    """Kernels or a transport: whether this machine can use them, and why not.

    Attributes:
        name: the word that the environment variable or the configuration takes.
        what: what it is, in a few words.
        obstacle: one sentence on what is missing; None where it can be used.
    """

    name: str
    what: str
    obstacle: str | None


@dataclass(frozen=True)
class Info:
    """Everything that is printed.

    Attributes:
        versions: of Python and of the packages that are installed.
        library: path of the operator library.
        library_obstacle: why it cannot be used; None where it can.
        hooks_obstacle: why the process-group hooks cannot be used; None where they can.
        build: how it was built; None where there is none.
        devices: GPUs with their compute capability.
        kernels: what can run the expert GEMMs.
        transports: what can carry rows between ranks.
        environment: the variables of torch_moe_ep that are set.
    """

    versions: dict[str, str]
    library: str
    library_obstacle: str | None
    hooks_obstacle: str | None
    build: BuildInfo | None
    devices: list[str]
    kernels: list[Choice]
    transports: list[Choice]
    environment: dict[str, str]


def installed_versions() -> dict[str, str]:
    """Returns the versions of Python and of those of PACKAGES that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    return versions


def load_obstacle() -> str | None:
    """Loads the library and returns why that fails, None where it does not."""
    reason = why_unusable(library_path())
    if reason is not None:
        return reason
    try:
        importlib.import_module("torch_moe_ep._library")
    except ImportError as error:
        return str(error)
    return None


def hooks_obstacle() -> str | None:
    """Loads the hooks' library and returns why that fails, None where it does not."""
    reason = why_hooks_unusable(hooks_path())
    if reason is not None:
        return reason
    try:
        importlib.import_module("torch_moe_ep.hooks.library")
    except ImportError as error:
        return str(error)
    return None


def compute_capabilities() -> list[tuple[int, int]]:
    """Returns the compute capability of every GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(idx) for idx in range(torch.cuda.device_count())]


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Returns whether kernels of any of these architectures run on a GPU.

    Machine code runs within its major version, PTX on everything later, and code for an
    architecture with a letter, such as 9.0a, on exactly that GPU.

    Args:
        architectures: in the form of TORCH_CUDA_ARCH_LIST, such as "8.0+PTX;9.0a".
        capability: of the GPU, such as (9, 0).
    """
    for word in re.split(r"[;\s,]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", word)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if match[3]:
            fits = built == capability
        else:
            fits = built <= capability and (built[0] == capability[0] or match[4] is not None)
        if fits:
            return True
    return False


def cuda_obstacle(build: BuildInfo | None, capabilities: Sequence[tuple[int, int]]) -> str | None:
    """Returns why no CUDA kernel can run here, None where some can."""
    if build is None:
        return NO_LIBRARY
    if not build.with_cuda:
        return "the library was built without CUDA"
    if not capabilities:
        return "torch sees no GPU"
    architectures = build.architectures or ""
    if not any(runs_on(architectures, capability) for capability in capabilities):
        return f"the library was built for {architectures}, which no GPU here runs"
    return None


def kernel_choices(
    build: BuildInfo | None, capabilities: Sequence[tuple[int, int]]
) -> list[Choice]:
    """Returns the kernels of the expert GEMMs, in the words of TORCH_MOE_EP_KERNELS."""
    cuda = cuda_obstacle(build, capabilities)
    architectures = (build.architectures if build else None) or ""
    sm90 = sm80 = cuda
    if cuda is None:
        if (9, 0) not in capabilities:
            sm90 = "they need a GPU of compute capability 9.0"
        elif "9.0a" not in architectures:
            sm90 = f"the library was built for {architectures}, without 9.0a"
        if max(capabilities) < (8, 0):
            sm80 = "they need a GPU of compute capability 8.0 or later"
    return [
        Choice("sm90", "hand-written wgmma kernels, bfloat16", sm90),
        Choice("sm80", "hand-written mma.sync kernels, bfloat16", sm80),
        Choice("torch", "torch's own GEMMs on CUDA, every type", cuda),
        Choice("cpu", CPU_KERNELS, NO_LIBRARY if build is None else None),
    ]


def peer_obstacle(build: BuildInfo | None) -> str | None:
    """Returns why no two GPUs here can carry rows themselves, None where some can."""
    if build is None or not build.with_cuda:
        return cuda_obstacle(build, [])
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus < 2:
        return f"it takes two GPUs of one host, found {num_gpus}"
    pairs = itertools.permutations(range(num_gpus), 2)
    if not any(torch.cuda.can_device_access_peer(one, other) for one, other in pairs):
        return f"none of the {num_gpus} GPUs can map another's memory"
    return None


def transport_choices(build: BuildInfo | None) -> list[Choice]:
    """Returns what can carry rows between ranks."""
    backends = [
        name
        for name in ("gloo", "nccl", "mpi", "ucc")
        if torch.distributed.is_available() and torch.distributed.is_backend_available(name)
    ]
    what = f"collectives of torch.distributed ({', '.join(backends) or 'no backend'})"
    obstacle = None if backends else "this torch was built without torch.distributed"
    return [
        Choice("collective", what, obstacle),
        Choice("hierarchical", "the same in two hops, a token crosses to a node once", obstacle),
        Choice(
            "peer",
            "GPUs of one host write and read rows in each other's memory",
            peer_obstacle(build) if obstacle is None else obstacle,
        ),
    ]


def collect() -> Info:
    """Looks at this machine; loads the operator library, starts no CUDA context of its own."""
    library = library_path()
    build = read_build_info(library) if library.is_file() else None
    capabilities = compute_capabilities()
    devices = [
        f"{torch.cuda.get_device_name(idx)} ({major}.{minor})"
        for idx, (major, minor) in enumerate(capabilities)
    ]
    variables = {key: value for key, value in os.environ.items() if key.startswith("TORCH_MOE_EP_")}
    return Info(
        versions=installed_versions(),
        library=str(library),
        library_obstacle=load_obstacle(),
        hooks_obstacle=hooks_obstacle(),
        build=build,
        devices=devices,
        kernels=kernel_choices(build, capabilities),
        transports=transport_choices(build),
        environment=dict(sorted(variables.items())),
    )


def as_text(info: Info) -> str:
    """Returns the report for people."""
    lines = [f"{name:<14} {version}" for name, version in info.versions.items()]
    lines.append(f"{'library':<14} {info.library}")
    if info.library_obstacle:
        lines.append(f"{'':<14} NOT USABLE: {info.library_obstacle}")
    if info.build is None:
        lines.append(f"{'built':<14} no")
    else:
        cuda = "without CUDA"
        if info.build.with_cuda:
            cuda = f"CUDA {info.build.cuda}, {info.build.nvcc}, for {info.build.architectures}"
        lines.append(f"{'built':<14} for torch {info.build.torch}, {cuda}")
    hooks = f"no: {info.hooks_obstacle}" if info.hooks_obstacle else "yes"
    lines.append(f"{'hooks':<14} {hooks}")
    lines.append(f"{'GPUs':<14} {', '.join(info.devices) or 'none that torch sees'}")
    for title, choices in (("kernels", info.kernels), ("transports", info.transports)):
        for choice in choices:
            state = f"no: {choice.obstacle}" if choice.obstacle else "yes"
            lines.append(f"{title:<14} {choice.name:<12} {choice.what}: {state}")
            title = ""  # noqa: PLW2901
    lines += [f"{name}={value}" for name, value in info.environment.items()]
    return "\n".join(lines)


def models_as_text(classes: Sequence[ExpertsClass]) -> str:
    """Returns the list of experts classes for people."""
    lines = []
    for known in classes:
        verdict = f"no: {known.misfit}" if known.misfit else "yes"
        lines.append(f"{known.model_type:<22} {known.name:<32} {verdict}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the report, or the list of models."""
    parser = argparse.ArgumentParser(prog="python -m torch_moe_ep.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--models", action="store_true", help="experts classes of transformers")
    arguments = parser.parse_args(argv)
    if arguments.models:
        classes = find_experts_classes()
        rows = [known._asdict() for known in classes]
        print(json.dumps(rows, indent=2) if arguments.json else models_as_text(classes))
        return
    info = collect()
    print(json.dumps(asdict(info), indent=2) if arguments.json else as_text(info))


if __name__ == "__main__":
    main()
