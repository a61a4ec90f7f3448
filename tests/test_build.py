"""The operator library: what it links, what packages hold, what a wrong torch is told."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch.utils import cpp_extension

from torch_moe_ep import _build_info, _library
from torch_moe_ep.hooks import library as hooks_library

ROOT = Path(__file__).resolve().parent.parent
NOTE = {"torch": "2.99.0", "with_cuda": False, "cuda": None, "nvcc": None, "architectures": None}

in_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout")
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")


def readelf(*options: str, library: Path | None = None) -> str:
    command = ["readelf", "--wide", *options, str(library or _build_info.library_path())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def run_setup(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def make_sdist(folder: Path, **environment: str) -> Path:
    made = run_setup(
        "-q",
        "egg_info",
        "--egg-base",
        str(folder),
        "sdist",
        "--dist-dir",
        str(folder),
        **environment,
    )
    assert made.returncode == 0, made.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


def folder_without_torch(folder: Path) -> str:
    """What build isolation does: `import torch` fails."""
    (folder / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')\n")
    return str(folder)


SETUP_WITH_CCACHE = """
import os, runpy, sys
from torch.utils import cpp_extension
if sys.argv.pop(1) == "torch wraps":
    cpp_extension._wrap_compiler = lambda compiler: [compiler]
elif hasattr(cpp_extension, "_wrap_compiler"):
    del cpp_extension._wrap_compiler
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
print("CXX:", os.environ.get("CXX"))
print("wrapper:", os.environ.get("TORCH_NO_COMPILER_WRAPPER"))
"""


@in_checkout
@pytest.mark.parametrize(
    ("who", "wish", "lines"),
    [
        ("torch does not", "1", ["CXX: {ccache} g++", "wrapper: None"]),
        ("torch wraps", "1", ["CXX: None", "wrapper: None"]),
        ("torch wraps", "0", ["CXX: None", "wrapper: 1"]),
    ],
)
def test_ccache_comes_before_the_compiler_once(
    tmp_path: Path, who: str, wish: str, lines: list[str]
) -> None:
    """Torch 2.15 puts it there by itself, and takes CXX for one word."""
    ccache = tmp_path / "ccache"
    ccache.write_text("#!/bin/sh\n")
    ccache.chmod(0o755)
    kept = ("CXX", "PYTORCH_NVCC", "TORCH_NO_COMPILER_WRAPPER")
    environment = {name: value for name, value in os.environ.items() if name not in kept}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_MOE_EP_CCACHE": wish}
    done = subprocess.run(
        [sys.executable, "-c", SETUP_WITH_CCACHE, who],
        cwd=ROOT,
        env={**environment, "TORCH_MOE_EP_CUDA": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-2:] == [line.format(ccache=ccache) for line in lines]


@needs_readelf
def test_library_links_neither_python_nor_torch_python():
    needed = [line for line in readelf("--dynamic").splitlines() if "(NEEDED)" in line]
    assert any("libtorch_cpu" in line for line in needed)
    assert not any("python" in line for line in needed)


@needs_readelf
def test_library_neither_uses_nor_defines_symbols_of_python():
    names = [line.split()[-1] for line in readelf("--dyn-syms").splitlines() if line.split()]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]


def test_library_of_another_torch_says_both_versions_and_the_command(tmp_path):
    (tmp_path / "_ops.torch2.99.so").touch()
    (tmp_path / "_ops.torch2.99.json").write_text(json.dumps(NOTE))
    with pytest.raises(ImportError) as raised:
        _library.load(_build_info.library_path(tmp_path))
    assert f"built for torch 2.99.0, found {torch.__version__}: rebuild with" in str(raised.value)
    assert "pip install --no-build-isolation" in str(raised.value)


def test_library_with_cuda_under_torch_without_cuda_says_so(tmp_path, monkeypatch):
    library = _build_info.library_path(tmp_path)
    library.touch()
    library.with_suffix(".json").write_text(json.dumps({**NOTE, "with_cuda": True, "cuda": "13.0"}))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ImportError, match=r"was built for CUDA 13\.0, found torch .* without CUDA"):
        _library.load(library)


def test_library_that_does_not_load_says_for_what_it_was_built(tmp_path):
    library = _build_info.library_path(tmp_path)
    library.write_text("not a library")
    library.with_suffix(".json").write_text(json.dumps(NOTE))
    with pytest.raises(
        ImportError, match=r"built for torch 2\.99\.0, .* does not load .*: rebuild"
    ):
        _library.load(library)


def test_library_that_is_missing_in_a_checkout_names_the_build_command(tmp_path):
    (tmp_path / "setup.py").touch()
    with pytest.raises(ImportError, match=r"no compiled library .* setup\.py build_ext --inplace"):
        _library.load(_build_info.library_path(tmp_path / "torch_moe_ep"))


@needs_readelf
def test_hooks_link_the_operators_beside_them():
    lines = readelf("--dynamic", library=_build_info.hooks_path()).splitlines()
    assert any(
        "(NEEDED)" in line and f"[{_build_info.library_path().name}]" in line for line in lines
    )
    assert any("(RUNPATH)" in line and "[$ORIGIN" in line for line in lines)


def test_hooks_of_another_python_say_both_and_the_command(tmp_path):
    wanted = _build_info.hooks_path(tmp_path)
    (tmp_path / wanted.name.replace(sys.implementation.cache_tag, "cpython-399")).touch()
    with pytest.raises(ImportError) as raised:
        hooks_library.load(wanted)
    here = sys.implementation.cache_tag
    assert f"hooks were built for cpython-399, found {here}: rebuild with `" in str(raised.value)


def test_hooks_that_are_missing_or_do_not_load_name_the_command(tmp_path):
    wanted = _build_info.hooks_path(tmp_path)
    with pytest.raises(ImportError, match=r"hooks were not built in .*: rebuild with `pip install"):
        hooks_library.load(wanted)
    wanted.write_text("not a library")
    note = _build_info.library_path(tmp_path).with_suffix(".json")
    note.write_text(json.dumps(NOTE))
    with pytest.raises(ImportError, match=r"hooks were built for torch 2\.99\.0, .* do not load"):
        hooks_library.load(wanted)


@in_checkout
def test_setup_with_unknown_choice_of_cuda_is_refused():
    done = run_setup("build_ext", TORCH_MOE_EP_CUDA="yes")
    assert done.returncode != 0
    assert "TORCH_MOE_EP_CUDA must be auto, 0 or 1, got 'yes'" in done.stderr


@in_checkout
def test_setup_prints_whether_it_builds_with_cuda():
    done = run_setup("--version", TORCH_MOE_EP_CUDA="0")
    assert "building without CUDA (TORCH_MOE_EP_CUDA=0)" in done.stdout


@in_checkout
def test_setup_without_nvcc_falls_back_or_says_what_is_missing(tmp_path):
    automatic = run_setup("--version", CUDA_HOME=str(tmp_path), TORCH_MOE_EP_CUDA="auto")
    assert "building without CUDA (" in automatic.stdout
    forced = run_setup("build_ext", CUDA_HOME=str(tmp_path), TORCH_MOE_EP_CUDA="1")
    assert forced.returncode != 0
    assert "TORCH_MOE_EP_CUDA=1, but " in forced.stderr


@in_checkout
def test_build_under_isolation_says_one_sentence(tmp_path):
    done = run_setup("bdist_wheel", PYTHONPATH=folder_without_torch(tmp_path))
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr


@in_checkout
def test_sdist_without_torch_holds_every_source_and_header(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with tarfile.open(make_sdist(tmp_path, PYTHONPATH=folder_without_torch(hidden))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu", ".cuh", ".h")
    }
    assert wanted
    assert wanted <= held
    assert {"setup.py", "pyproject.toml", "LICENSE", "torch_moe_ep/py.typed"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def twine_check(*paths: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr


@in_checkout
def test_sdist_passes_twine_check(tmp_path):
    pytest.importorskip("twine")
    twine_check(make_sdist(tmp_path))


def needed_distributions(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Distributions of this environment by name, and those that pip would find required."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen, waiting = set(), [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        found[wanted.name] = importlib.metadata.distribution(wanted.name)
        for requirement in map(Requirement, found[wanted.name].requires or ()):
            marker, extras = requirement.marker, ("", *wanted.extras)
            is_needed = marker is None or any(marker.evaluate({"extra": e}) for e in extras)
            if is_needed and str(requirement) not in seen:
                seen.add(str(requirement))
                waiting.append(requirement)
    return found


def requirements_of_project() -> list[str]:
    """``dependencies`` of pyproject.toml; Python 3.10 has no parser for it."""
    text = (ROOT / "pyproject.toml").read_text()
    return re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)\]", text, re.M)[1])


def empty_environment(folder: Path) -> Path:
    """A virtual environment with torch, what building needs and what we require; its python.

    The packages are links to those of this environment: nothing is downloaded.
    """
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    ours = requirements_of_project()
    for distribution in needed_distributions([*ours, "setuptools", "ninja"]).values():
        for file in distribution.files or ():
            source, top = Path(distribution.locate_file(file.parts[0])), site / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not top.exists():
                top.symlink_to(source)
    (folder / "bin" / "ninja").symlink_to(shutil.which("ninja", path=Path(sys.executable).parent))
    return folder / "bin" / "python"


USE = """
import importlib.util, json
import torch
import torch_moe_ep, torch_moe_ep.hooks
from torch_moe_ep import info, ops

plan = ops.plan(torch.tensor([[1, 0], [1, 3]]), 4)
rows, _ = ops.dispatch(torch.ones(2, 8), torch.ones(2, 2), plan)
assert torch.equal(ops.combine(rows, plan), torch.full((2, 8), 2.0))
assert importlib.util.find_spec("transformers") is None
found = info.collect()
assert found.library_obstacle is None and found.hooks_obstacle is None
print(json.dumps([torch_moe_ep.__file__, found.build.with_cuda]))
"""


@in_checkout
@pytest.mark.full
@in_checkout
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_what_make_installs_exists_for_every_python(python: str, tmp_path: Path) -> None:
    """Asks the package index; a line may be for some versions of Python alone."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = [f"{w.name}{w.specifier}" for w in wanted if not w.marker or w.marker.evaluate(versions)]
    options = ["--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(tmp_path)]
    found = subprocess.run(
        [*command, "--python-version", python, *pins], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.full
@pytest.mark.parametrize("has_toolkit", [False, True], ids=["without_toolkit", "with_toolkit"])
def test_pip_installs_the_sdist_in_an_empty_environment(tmp_path, has_toolkit):
    """With the toolkit from the sdist at once, without it by way of a wheel."""
    home = tmp_path / "no-toolkit"
    home.mkdir()
    environment = {"TORCH_MOE_EP_CUDA": "auto", "CUDA_HOME": str(home)}
    if has_toolkit:
        if cpp_extension.CUDA_HOME is None or torch.version.cuda is None:
            pytest.skip("needs the CUDA toolkit and a torch with CUDA")
        # One architecture: the kernels for 9.0a are most of a build's time.
        environment = {"TORCH_MOE_EP_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    python = empty_environment(tmp_path / "environment")
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": "", **environment}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    archive = make_sdist(tmp_path)
    if not has_toolkit:
        wheels = str(tmp_path / "wheels")
        command = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, str(archive)]
        subprocess.run(command, env=environment, check=True)
        (archive,) = Path(wheels).glob("*.whl")
        assert "-cp310-abi3-" in archive.name
        twine_check(archive)
    command = [*pip, "install", "--no-build-isolation", "--no-index", str(archive)]
    subprocess.run(command, env=environment, check=True)
    done = subprocess.run(
        [str(python), "-c", USE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, with_cuda = json.loads(done.stdout)
    assert file.startswith(str(tmp_path)) and with_cuda == has_toolkit


def test_every_module_can_be_the_first_that_is_imported():
    """In a fork for each: torch and transformers are there, nothing of torch_moe_ep is."""
    code = """
import os, pkgutil, sys, traceback
import torch, torch.distributed.fsdp, transformers.models.mixtral.modeling_mixtral
from importlib import import_module
from pathlib import Path
root = Path(sys.argv[1])
names = [".".join(path.relative_to(root).with_suffix("").parts) for path in
         sorted((root / "torch_moe_ep").rglob("*.py")) if path.stem != "__main__"]
failed = []
for name in names:
    child = os.fork()
    if child == 0:
        try:
            import_module(name.removesuffix(".__init__"))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(name)
print(len(names), failed)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    count, failed = done.stdout.split(maxsplit=1)
    assert int(count) > 40 and failed.strip() == "[]", done.stdout + done.stderr
