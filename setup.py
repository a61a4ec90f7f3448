"""Builds the libraries of torch_moe_ep; everything else is in pyproject.toml.

The operator library has no Python in it: no module init function and no link to libpython or
libtorch_python. One binary serves every CPython, and torch_moe_ep/_library.py loads it with
torch.ops.load_library. The second one, of csrc/python, shows Python the process-group hooks of the
first, is small, and belongs to one CPython.

Environment:
    TORCH_MOE_EP_CUDA     auto (default: with CUDA when torch has it and nvcc is found), 0 or 1
    TORCH_CUDA_ARCH_LIST  architectures, default "8.0+PTX;9.0a"
    MAX_JOBS              compilers run at once, default the number of cores
    TORCH_MOE_EP_CCACHE   0 leaves ccache alone though it is installed
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
LICENSE = "Apache-2.0"
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"
CUDA_ONLY_FOLDERS = ("sm80", "sm90")
OPERATORS, HOOKS = "torch_moe_ep._ops", "torch_moe_ep._hooks"
COMMANDS_WITHOUT_TORCH = ("sdist", "egg_info", "clean", "--name", "--version")
NO_TORCH = (
    "torch_moe_ep is compiled against the torch that will run it, and no torch can be imported "
    "here (build isolation hides the installed one): install torch, setuptools and ninja, then "
    "run `pip install --no-build-isolation .`"
)

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    if not any(command in sys.argv for command in COMMANDS_WITHOUT_TORCH):
        sys.exit(NO_TORCH)
    setup(license=LICENSE)
    sys.exit(0)


def torch_release() -> str:
    """Returns "2.11" for torch 2.11.0+cu130: C++ symbols of torch stay the same within one."""
    return ".".join(torch.__version__.split(".")[:2])


def nvcc_path() -> Path | None:
    """Returns the nvcc that torch would run, None where there is none."""
    home = cpp_extension.CUDA_HOME
    path = Path(home) / "bin" / "nvcc" if home else None
    return path if path and path.is_file() else None


def decide_cuda() -> bool:
    """Decides by torch and the toolkit, never by a visible GPU: builders have none."""
    choice = os.environ.get("TORCH_MOE_EP_CUDA", "auto").strip().lower() or "auto"
    if choice not in ("auto", "0", "1"):
        sys.exit(f"TORCH_MOE_EP_CUDA must be auto, 0 or 1, got {choice!r}")
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is a build without CUDA"
    elif nvcc_path() is None:
        home = cpp_extension.CUDA_HOME
        missing = f"CUDA_HOME={home} has no bin/nvcc (install the CUDA toolkit or set CUDA_HOME)"
    if choice == "1" and missing:
        sys.exit(f"TORCH_MOE_EP_CUDA=1, but {missing}")
    with_cuda = choice != "0" and missing is None
    reason = missing if choice == "auto" and missing else f"TORCH_MOE_EP_CUDA={choice}"
    print(f"torch_moe_ep: building {'with' if with_cuda else 'without'} CUDA ({reason})")
    return with_cuda


def is_cuda_only(source: Path) -> bool:
    """Returns whether a CPU-only build leaves this file out; there is no #ifdef for it."""
    return (
        source.suffix == ".cu"
        or source.stem.endswith("_cuda")
        or any(folder in source.parent.parts for folder in CUDA_ONLY_FOLDERS)
    )


def find_sources(with_cuda: bool) -> list[str]:
    """Returns the operators' sources relative to the root; two of one stem share an object file."""
    found = sorted(
        path.relative_to(ROOT)
        for pattern in ("*.cpp", "*.cu")
        for path in (ROOT / "csrc").rglob(pattern)
        if path.parent != ROOT / "csrc" / "python"
    )
    sources = [path for path in found if with_cuda or not is_cuda_only(path)]
    stems: dict[Path, Path] = {}
    for source in sources:
        other = stems.setdefault(source.with_suffix(""), source)
        if other != source:
            sys.exit(f"{other} and {source} share an object file: give one of them another stem")
    return [str(source) for source in sources]


def system_includes(with_cuda: bool) -> list[str]:
    """Makes the headers of torch and CUDA system headers; g++ then drops -I of the same folder."""
    device = "cuda" if with_cuda else "cpu"
    return [flag for path in cpp_extension.include_paths(device) for flag in ("-isystem", path)]


def cxx_flags() -> list[str]:
    """Returns the host compiler's flags: warnings as errors, symbols hidden unless marked."""
    # Without -fopenmp at::parallel_for, a header, runs on one thread.
    flags = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
    # A newer torch may deprecate what the oldest supported one has no other name for.
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-error=deprecated-declarations"]
    # g++ 13 sees an array end that is none in torch's save_for_backward({...}).
    return [*flags, "-Wno-error=array-bounds"]


def make_operators(with_cuda: bool) -> cpp_extension.CppExtension:
    """Describes the operator library: every symbol resolved at link time."""
    includes = system_includes(with_cuda)
    nvcc = ["-std=c++20", "-O3", "-lineinfo", "-Werror", "all-warnings"]
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return make(
        name=OPERATORS,
        sources=find_sources(with_cuda),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx_flags() + includes, "nvcc": nvcc + includes},
        extra_link_args=["-fopenmp", "-Wl,--no-undefined", "-Wl,--as-needed"],
        py_limited_api=True,
    )


def make_hooks() -> cpp_extension.CppExtension:
    """Describes the hooks' library, which finds the operators' beside it when it is loaded."""
    return cpp_extension.CppExtension(
        name=HOOKS,
        sources=["csrc/python/hooks_module.cpp"],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx_flags() + system_includes(with_cuda=False)},
        extra_link_args=[f"-l:_ops.torch{torch_release()}.so", "-Wl,-rpath,$ORIGIN"],
    )


def use_ccache(with_cuda: bool) -> None:
    """Puts ccache before both compilers where it is installed and nobody chose a compiler."""
    ccache = shutil.which("ccache")
    if os.environ.get("TORCH_MOE_EP_CCACHE") == "0":
        os.environ.setdefault("TORCH_NO_COMPILER_WRAPPER", "1")
        return
    torch_does_it = hasattr(cpp_extension, "_wrap_compiler")  # seen in 2.15, which quotes CXX too
    if ccache is None or torch_does_it:
        return
    # torch looks for a compiler of this name to check its ABI and does not know the two words.
    os.environ.setdefault("TORCH_DONT_CHECK_COMPILER_ABI", "1")
    os.environ.setdefault("CXX", f"{ccache} g++")
    if with_cuda:
        os.environ.setdefault("PYTORCH_NVCC", f"{ccache} {nvcc_path()}")


class BuildLibrary(cpp_extension.BuildExtension):
    """Names the library after torch's release and leaves beside it a note of how it was built.

    Libraries for several releases of torch lie side by side in one source tree, each with its own
    objects, so that testing against another torch neither breaks nor rebuilds the first.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        # Editable installs would compile in a folder that is thrown away.
        device = "cuda" if WITH_CUDA else "cpu"
        variant = f"torch{torch.__version__}-{sys.implementation.cache_tag}-{device}"
        self.build_temp = str(ROOT / "build" / "objects" / variant)

    def get_ext_filename(self, ext_name: str) -> str:
        python = f".{sys.implementation.cache_tag}" if ext_name.endswith("_hooks") else ""
        return f"{ext_name.replace('.', os.sep)}.torch{torch_release()}{python}.so"

    def build_extension(self, ext: Extension) -> None:
        if ext.name == HOOKS:  # the operators come first in the list and are built by now
            ext.library_dirs.append(str(Path(self.get_ext_fullpath(OPERATORS)).parent.resolve()))
        super().build_extension(ext)

    def run(self) -> None:
        # build/ outlives a build: a wheel must not take along what was built for another torch.
        for stale in (Path(self.build_lib) / "torch_moe_ep").glob("_*.torch*"):
            stale.unlink()
        super().run()
        note = Path(self.get_ext_fullpath(OPERATORS)).with_suffix(".json")
        note.write_text(json.dumps(build_info(), indent=2) + "\n")


def build_info() -> dict[str, str | bool | None]:
    """Returns what torch_moe_ep/_library.py compares with the torch that is imported."""
    return {
        "torch": torch.__version__,
        "with_cuda": WITH_CUDA,
        "cuda": torch.version.cuda if WITH_CUDA else None,
        "nvcc": str(nvcc_path()) if WITH_CUDA else None,
        "architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if WITH_CUDA else None,
    }


WITH_CUDA = decide_cuda()
if WITH_CUDA:
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    print(f"torch_moe_ep: {nvcc_path()}, architectures {architectures}")
use_ccache(WITH_CUDA)
OPERATOR_LIBRARY = make_operators(WITH_CUDA)
setup(
    license=LICENSE,
    ext_modules=[OPERATOR_LIBRARY, make_hooks()] if OPERATOR_LIBRARY.sources else [],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
