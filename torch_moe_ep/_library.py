"""Loads the operator library that setup.py built for the torch that is imported.

The library registers its operators with torch when it is loaded; nothing is called in it from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REBUILD_COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps torch_moe_ep"
REBUILD_COMMAND_SOURCE = "python setup.py build_ext --inplace"


@dataclass(frozen=True)
class BuildInfo:
    """How a library was built.

    Attributes:
        torch: version of torch whose headers were used, such as "2.11.0+cu130".
        with_cuda: whether CUDA kernels are in it.
        cuda: CUDA version of that torch, None without CUDA.
        nvcc: path of the compiler, None without CUDA.
        architectures: in the form of TORCH_CUDA_ARCH_LIST, None without CUDA.
    """

    torch: str
    with_cuda: bool
    cuda: str | None
    nvcc: str | None
    architectures: str | None


def release_of(version: str) -> str:
    """Returns "2.11" for "2.11.0+cu130": the C++ symbols of torch stay the same within one."""
    return ".".join(version.split(".")[:2])


def library_path(folder: Path | None = None) -> Path:
    """Returns where the library for the imported torch belongs, be it there or not."""
    folder = Path(__file__).parent if folder is None else folder
    return folder / f"_ops.torch{release_of(torch.__version__)}.so"


def build_info(library: Path | None = None) -> BuildInfo:
    """Returns how the library was built, from the note that setup.py leaves beside it."""
    note = (library_path() if library is None else library).with_suffix(".json")
    fields: dict[str, Any] = json.loads(note.read_text())
    return BuildInfo(**fields)


def rebuild_command(folder: Path) -> str:
    """Returns the command that builds the library for the imported torch."""
    if (folder.parent / "setup.py").is_file():
        return f"cd {folder.parent} && {REBUILD_COMMAND_SOURCE}"
    return REBUILD_COMMAND


def why_unusable(library: Path) -> str | None:
    """Returns one sentence on why the library cannot serve the imported torch, None where it can."""
    command = rebuild_command(library.parent)
    if library.is_file():
        built_cuda = build_info(library).cuda
        if built_cuda is None or torch.version.cuda is not None:
            return None
        return (
            f"torch_moe_ep was built for CUDA {built_cuda}, found torch {torch.__version__} without "
            f"CUDA: rebuild with `{command}`"
        )
    others = sorted(library.parent.glob("_ops.torch*.so"))
    if others:
        built = ", ".join(build_info(other).torch for other in others)
        return (
            f"torch_moe_ep was built for torch {built}, found {torch.__version__}: "
            f"rebuild with `{command}`"
        )
    return f"torch_moe_ep has no compiled library in {library.parent}: build it with `{command}`"


def load(folder: Path | None = None) -> None:
    """Loads the library, once per process.

    Args:
        folder: where it lies, the package's own folder by default.

    Raises:
        ImportError: it is missing, built for another torch or does not load; the message holds
            the command that rebuilds it.
    """
    library = library_path(folder)
    reason = why_unusable(library)
    if reason is not None:
        raise ImportError(reason)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"torch_moe_ep was built for torch {build_info(library).torch}, found "
            f"{torch.__version__}, and does not load ({error}): "
            f"rebuild with `{rebuild_command(library.parent)}`"
        ) from error


load()
