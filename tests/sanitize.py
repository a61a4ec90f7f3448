"""Runs the GPU tests' small cases under compute-sanitizer and keeps what it found as a result file.

    python -m tests.sanitize                                  # all four tools
    python -m tests.sanitize --tools memcheck racecheck

Each tool must find a planted fault first (planted_faults.cu, compiled with nvcc); else its run
would prove nothing. Then memcheck, racecheck and synccheck look at this package's kernels alone,
initcheck at all kernels, as it must see who writes what, with PyTorch's caching allocator off.
compute-sanitizer 2025.3 has two limits. racecheck breaks off at a library's GEMM for Hopper, also
where it looks at others alone, and initcheck takes minutes over one: their oracles go to the CPU,
and fp16, for which the operators call such a GEMM, is left out. initcheck does not see what TMA
stores: where a second kernel reads what an sm_90a GEMM stored, tests are left out of it. Findings
in this package's kernels, or a tool that broke off, fail the run: exit status 1. A tool's rows
replace those of an earlier run from the same commit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OURS = "torch_moe_ep"
FAULTS = Path(__file__).with_name("planted_faults.cu")
SHOWN_FINDINGS = 3
SHOWN_CHARACTERS = 4000
CASE_TABLE = "the small cases of tests/gpu"
KINDS = ("grouped_gemm", "expert_mlp", "movement", "plan", "route", "sinkhorn")
FILES = [f"tests/gpu/test_{kind}.py" for kind in KINDS]
KEPT = re.compile(
    r"test_(grouped_gemm_equals_oracle|expert_mlp_equals_oracle|dispatch_equals_cpu"
    r"|combine_equals_cpu|movement_gradients_equal_cpu|plan_equals_cpu|route_equals_torch"
    r"|sinkhorn_equals_the_loop)"
)
# Torch's own kernels, and sizes that take long under a tool without reaching other code.
LEFT_OUT = re.compile(
    r"\[torch-|-torch\]|N968-K4096|T1024-|T1000-E128|T513-|-False\]|\(16384|\(5000|-20\]|dtype2"
)
# Not at the start of a line alone: pytest's dots may stand before it.
FINDING = re.compile(
    r"========= (Invalid|Misaligned|Out-of-range|Uninitialized|(Error|Warning): Race"
    r"|(Potential )?(RAW|WAR|WAW) hazard|Race|Barrier error|Program hit|Kernel)"
)
TOO_LONG = "========= Internal Sanitizer Error: ran past"
BROKE_OFF = re.compile(r"========= (Internal Sanitizer Error.*)")
PASSED = re.compile(r"(\d+) passed")
FAILED = re.compile(r"\d+ failed|\d+ errors? in ")
WITHOUT_LIBRARY_GEMMS = ("racecheck", "initcheck")
LIBRARY_GEMM = re.compile(r"test_expert_mlp_equals_oracle\[auto-.*-float16")
# Kernels that read what an sm_90a GEMM stored.
READS_TMA_STORES = re.compile(r"test_expert_mlp_equals_oracle\[(auto|fused)-.*bfloat16")


class SmallCases:
    """A pytest plugin: keeps what a tool gets through in seconds."""

    def __init__(self, tool: str) -> None:
        self.tool = tool

    def is_kept(self, test: str) -> bool:
        """Whether the tool gets this test, by its node id."""
        if self.tool in WITHOUT_LIBRARY_GEMMS and LIBRARY_GEMM.search(test):
            return False
        if self.tool == "initcheck" and READS_TMA_STORES.search(test):
            return False
        return KEPT.search(test) is not None and LEFT_OUT.search(test) is None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drops every other test."""
        items[:] = [item for item in items if self.is_kept(item.nodeid)]


@dataclass(frozen=True)
class Report:
    """What one run under a tool printed."""

    text: str
    seconds: float

    def texts_of_findings(self, kernel: str) -> list[str]:
        """The findings that name a kernel like this, whole."""
        starts = [match.start() for match in FINDING.finditer(self.text)]
        found = [self.text[a:b] for a, b in itertools.pairwise([*starts, len(self.text)])]
        return [text for text in found if kernel in text]

    def findings(self, kernel: str) -> list[str]:
        """The first line of each."""
        lines = [text.splitlines()[0] for text in self.texts_of_findings(kernel)]
        return [line.removeprefix("========= ")[:200] for line in lines]

    def excerpt(self, kernel: str) -> str:
        """What to read of a run that is not clean: the first findings, or how it ended."""
        found = "".join(self.texts_of_findings(kernel)[:SHOWN_FINDINGS])
        return found or self.text[-SHOWN_CHARACTERS:]

    @property
    def broke_off(self) -> str | None:
        """The tool's own error, if it had one."""
        match = BROKE_OFF.search(self.text)
        return match[1] if match else None


def compute_sanitizer() -> str:
    """Its path.

    Raises:
        FileNotFoundError: the CUDA toolkit here has none.
    """
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    folders = [f"{place}/{sub}" for place in places for sub in ("bin", "compute-sanitizer")]
    path = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *folders]))
    if path is None:
        raise FileNotFoundError("compute-sanitizer was not found: it comes with the CUDA toolkit.")
    return path


def run_under(tool: str, command: Sequence[str], kernel: str | None, timeout: float) -> Report:
    """Run a command under a tool, looking at kernels whose name holds `kernel` (None: all)."""
    options = ["--tool", tool, "--print-limit", "200"]
    if kernel is not None:
        options += ["--kernel-name", f"kernel_substring={kernel}"]
    environment = dict(os.environ)
    if tool in WITHOUT_LIBRARY_GEMMS:
        environment["TESTS_ORACLE_DEVICE"] = "cpu"
    if tool == "initcheck":
        options += ["--check-api-memory-access", "no"]  # what the host copies, no kernel
        environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TESTS_UNDER_INITCHECK": "1"}
    started = time.monotonic()
    try:
        text = subprocess.run(
            [compute_sanitizer(), *options, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env=environment,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as error:
        # What it said until then, as bytes whatever `text` is.
        said = error.stdout.decode(errors="replace") if error.stdout else ""
        text = f"{said}\n{TOO_LONG} {timeout:g} s\n"
    return Report(text, time.monotonic() - started)


def build_faults(folder: str) -> str:
    """Compile the planted faults for this device; return the program's path."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    program = f"{folder}/planted_faults"
    subprocess.run([nvcc, "-arch=native", "-lineinfo", str(FAULTS), "-o", program], check=True)
    return program


def planted_row(tool: str, program: str, timeout: float) -> dict[str, Any]:
    """What the tool says of the planted fault; not finding it is not clean."""
    report = run_under(tool, [program, tool], "planted", timeout)
    found = report.findings("planted")
    row = {"name": tool, "case": "planted fault", "value": len(found), "unit": "findings"}
    message = found[0] if found else report.broke_off or "not found: the tool's run proves nothing"
    return {**row, "message": message, "is_clean": bool(found)}


def case_rows(tool: str, report: Report) -> list[dict[str, Any]]:
    """What a run of the small cases showed."""
    passed = PASSED.search(report.text)
    base = {"name": tool, "case": CASE_TABLE}
    rows: list[dict[str, Any]] = [
        {**base, "value": int(passed[1]) if passed else 0, "unit": "tests passed"},
        {**base, "value": round(report.seconds, 1), "unit": "s"},
    ]
    found = report.findings(OURS)
    failed = FAILED.search(report.text)
    broke_off = report.broke_off or (f"tests: {failed[0].removesuffix(' in ')}" if failed else None)
    if not passed:
        broke_off = broke_off or "no test passed"
    last = {**base, "value": len(found), "unit": f"findings in {OURS}"}
    if broke_off or found:
        last["message"] = broke_off or found[0]
    return [*rows, {**last, "is_clean": not broke_off and not found}]


def run_cases(tool: str) -> int:
    """The child under the tool: the small cases, by pytest."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    return int(pytest.main([*options, *FILES], plugins=[SmallCases(tool)]))


def check_cases(tool: str, timeout: float, logs: Path | None) -> list[dict[str, Any]]:
    """Run the small cases under the tool; what is not clean is printed."""
    kernel = None if tool == "initcheck" else OURS
    child = [sys.executable, "-m", "tests.sanitize", "--cases_for", tool]
    report = run_under(tool, child, kernel, timeout)
    rows = case_rows(tool, report)
    if not rows[-1]["is_clean"]:
        sys.stdout.write(report.excerpt(OURS) + "\n")
    if logs:
        (logs / f"{tool}.log").write_text(report.text)
    return rows


def main() -> int:
    """Run the tools; 1 when one found something in this package's kernels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each run")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<date>-...json")
    parser.add_argument("--logs", type=Path, help="made if need be; what tools printed")
    parser.add_argument("--commit", default="", help="where there is no git checkout")
    parser.add_argument("--cases_for", choices=TOOLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cases_for:
        return run_cases(arguments.cases_for)
    if arguments.logs:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    is_clean = True
    with tempfile.TemporaryDirectory() as folder:
        program = build_faults(folder)
        for tool in arguments.tools:
            rows = [planted_row(tool, program, arguments.timeout)]
            if rows[0]["is_clean"]:
                rows += check_cases(tool, arguments.timeout, arguments.logs)
            is_clean &= all(row.get("is_clean", True) for row in rows)
            sys.stdout.write(common.format_table(rows) + "\n")
            # Tool by tool: a run that is cut off keeps what it has found.
            common.write_results(
                "sanitizer", rows, arguments.output, arguments.commit, "tests.sanitize"
            )
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
