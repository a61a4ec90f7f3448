"""Compiles the programs of tests/hopper_model: device code of csrc, run on the host."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TESTS = Path(__file__).parent
SOURCES = TESTS / "hopper_model"


def compiled(name: str, folder: Path) -> Path:
    """The program of a source; its headers come before those of csrc."""
    program = folder / name
    options = ["-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    folders = [f"-I{SOURCES}", f"-I{TESTS.parent / 'csrc'}"]
    source = SOURCES / f"{name}.cpp"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *options, *folders, source, "-o", program], check=True)
    return program
