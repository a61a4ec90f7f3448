"""How the operator library was built, and whether the torch that is imported can use it.

Nothing is loaded here, so that ``python -m torch_moe_ep.info`` can describe a library that does
not load. setup.py builds one library for each release of torch and leaves a note beside it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKAGE_FOLDER = Path(__file__).parent
BUILD_IN_PLACE = "python setup.py build_ext --inplace"
BUILD_FROM_CHECKOUT = (
    "pip install --no-build-isolation --force-reinstall --no-deps <checkout of torch_moe_ep>"
)


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


def library_path(folder: Path = PACKAGE_FOLDER) -> Path:
    """Returns where the library for the imported torch belongs, be it there or not."""
    return folder / f"_ops.torch{release_of(torch.__version__)}.so"


def hooks_path(folder: Path = PACKAGE_FOLDER) -> Path:
    """Returns where the hooks' library for the imported torch and this Python belongs."""
    name = f"_hooks.torch{release_of(torch.__version__)}.{sys.implementation.cache_tag}.so"
    return folder / name


def read_build_info(library: Path) -> BuildInfo:
    """Returns how the library was built, from the note beside it."""
    fields: dict[str, Any] = json.loads(library.with_suffix(".json").read_text())
    return BuildInfo(**fields)


def rebuild_command(folder: Path) -> str:
    """Returns the command that builds the library for the imported torch."""
    if (folder.parent / "setup.py").is_file():
        return f"cd {folder.parent} && {BUILD_IN_PLACE}"
    return BUILD_FROM_CHECKOUT


def why_unusable(library: Path) -> str | None:
    """Returns a sentence on why the imported torch cannot use the library, None where it can."""
    command = rebuild_command(library.parent)
    if library.is_file():
        built_cuda = read_build_info(library).cuda
        if built_cuda is None or torch.version.cuda is not None:
            return None
        return (
            f"torch_moe_ep was built for CUDA {built_cuda}, found torch {torch.__version__} "
            f"without CUDA: rebuild with `{command}`"
        )
    others = sorted(library.parent.glob("_ops.torch*.so"))
    if others:
        built = ", ".join(read_build_info(other).torch for other in others)
        return (
            f"torch_moe_ep was built for torch {built}, found {torch.__version__}: "
            f"rebuild with `{command}`"
        )
    return f"torch_moe_ep has no compiled library in {library.parent}: build it with `{command}`"


def why_hooks_unusable(hooks: Path) -> str | None:
    """Returns a sentence on why this Python cannot use the hooks' library, None where it can.

    The operators' library of the same torch is looked at apart (`why_unusable`).
    """
    if hooks.is_file():
        return None
    command = rebuild_command(hooks.parent)
    here = sys.implementation.cache_tag
    others = sorted(hooks.parent.glob(f"_hooks.torch{release_of(torch.__version__)}.*.so"))
    if others:
        built = ", ".join(other.name.split(".")[-2] for other in others)
        return (
            f"torch_moe_ep's hooks were built for {built}, found {here}: rebuild with `{command}`"
        )
    return f"torch_moe_ep's hooks were not built in {hooks.parent}: rebuild with `{command}`"
