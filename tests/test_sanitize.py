"""What `python -m tests.sanitize` reads from texts as compute-sanitizer prints them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sanitize

CLEAN = """========= COMPUTE-SANITIZER
.... [100%]
169 passed in 16.54s
========= ERROR SUMMARY: 0 errors
"""
IN_OUR_KERNEL = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at torch_moe_ep::sm80::grouped_gemm_kernel(KernelArguments)+0x70
=========     by thread (31,0,0) in block (0,0,0)
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at at::native::reduce_kernel(float *)+0x20
=========
3 passed in 1.00s
========= ERROR SUMMARY: 2 errors
"""
BROKEN_OFF = """========= COMPUTE-SANITIZER
========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.
=========
1 failed, 168 errors in 13.68s
"""


def last_row(text: str) -> dict[str, object]:
    return sanitize.case_rows("memcheck", sanitize.Report(text, 1.0))[-1]


def test_clean_run_is_clean() -> None:
    row = last_row(CLEAN)
    assert (row["value"], row["is_clean"]) == (0, True)
    assert "message" not in row


def test_findings_are_counted_in_our_kernels_alone() -> None:
    row = last_row(IN_OUR_KERNEL)
    assert (row["value"], row["is_clean"]) == (1, False)
    assert row["message"] == "Invalid __global__ write of size 4 bytes"


@pytest.mark.parametrize("text", [IN_OUR_KERNEL, BROKEN_OFF], ids=["finding", "broke off"])
def test_what_a_tool_says_behind_the_dots_of_pytest_counts(text: str) -> None:
    assert last_row(text) == last_row(text.replace("SANITIZER\n", "SANITIZER\n..", 1))
    assert last_row(text)["is_clean"] is False


def test_what_is_shown_of_a_run_that_is_not_clean() -> None:
    """The findings in our kernels, whole; without any, how the run ended."""
    found = sanitize.Report(IN_OUR_KERNEL, 1.0).excerpt(sanitize.OURS)
    assert "grouped_gemm_kernel(KernelArguments)+0x70" in found
    assert "reduce_kernel" not in found
    assert "1 failed, 168 errors" in sanitize.Report(BROKEN_OFF, 1.0).excerpt(sanitize.OURS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BROKEN_OFF, "Internal Sanitizer Error"),
        ("========= COMPUTE-SANITIZER\n", "no test passed"),
        (CLEAN.replace("169 passed", "1 failed, 168 passed"), "tests: 1 failed"),
    ],
    ids=["tool error", "nothing ran", "a test failed"],
)
def test_run_that_proves_nothing_is_not_clean(text: str, message: str) -> None:
    row = last_row(text)
    assert row["is_clean"] is False
    assert message in str(row["message"])


@pytest.mark.parametrize(
    ("test", "tools"),
    [
        ("grouped_gemm_equals_oracle[E1-128-N8-K8-NT-auto]", sanitize.TOOLS),
        ("grouped_gemm_equals_oracle[E1-128-N8-K8-NT-sm80]", sanitize.TOOLS),
        ("grouped_gemm_equals_oracle[E1-128-N8-K8-NT-torch]", ()),
        ("expert_mlp_equals_oracle[auto-T64-E1-one-float32-I128]", sanitize.TOOLS),
        ("expert_mlp_equals_oracle[sm80-T64-E1-one-bfloat16-I128]", sanitize.TOOLS),
        (
            "expert_mlp_equals_oracle[auto-T64-E1-one-bfloat16-I128]",
            ("memcheck", "racecheck", "synccheck"),
        ),
        ("expert_mlp_equals_oracle[auto-T64-E1-one-float16-I128]", ("memcheck", "synccheck")),
    ],
)
def test_which_tools_get_a_test(test: str, tools: tuple[str, ...]) -> None:
    """initcheck takes what an sm_90a GEMM stored for unwritten; fp16 goes to a library's GEMM."""
    node = f"tests/gpu/test_of.py::test_{test}"
    assert tuple(t for t in sanitize.TOOLS if sanitize.SmallCases(t).is_kept(node)) == tools


@pytest.mark.parametrize(
    ("printed", "is_clean", "message"),
    [
        ("========= Invalid __global__ write of size 4\n=== at planted_write()", True, "Invalid"),
        ("========= ERROR SUMMARY: 0 errors\n", False, "proves nothing"),
        (f"{sanitize.TOO_LONG} 9 s\n", False, "ran past 9 s"),
    ],
    ids=["found", "not found", "too long"],
)
def test_planted_fault_decides_whether_a_tool_is_believed(
    printed: str, is_clean: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = sanitize.Report(printed, 1.0)
    monkeypatch.setattr(sanitize, "run_under", lambda *_: report)
    row = sanitize.planted_row("memcheck", "program", 9.0)
    assert row["is_clean"] is is_clean
    assert message in row["message"]


def test_logs_go_to_a_folder_that_did_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run of two tools, each of which finds its planted fault and nothing else."""
    planted = "========= Invalid __global__ write of size 4\n=== at planted_write()"

    def run_under(_tool: str, command: list[str], *_: object) -> sanitize.Report:
        return sanitize.Report(planted if command[0] == "faults" else CLEAN, 1.0)

    monkeypatch.setattr(sanitize, "build_faults", lambda _: "faults")
    monkeypatch.setattr(sanitize, "run_under", run_under)
    folder, output = tmp_path / "logs" / "today", tmp_path / "sanitizer.json"
    tools = ["memcheck", "synccheck"]
    options = ["--tools", *tools, "--logs", str(folder), "--output", str(output), "--commit", "c"]
    monkeypatch.setattr(sys, "argv", ["sanitize", *options])
    assert sanitize.main() == 0
    assert [(folder / f"{tool}.log").read_text() for tool in tools] == [CLEAN] * 2
    assert [row["is_clean"] for row in json.loads(output.read_text())["rows"][::4]] == [True] * 2


MARKS = ("TESTS_UNDER_INITCHECK", "TESTS_ORACLE_DEVICE")


@pytest.mark.parametrize(
    ("tool", "oracle_device", "fills"),
    [("memcheck", "cuda", "True"), ("racecheck", "cpu", "True"), ("initcheck", "cpu", "False")],
)
def test_what_a_tool_changes_in_the_tests_of_its_child(
    tool: str, oracle_device: str, fills: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under initcheck NaN written into fresh memory would hide who reads it unwritten."""
    started: dict[str, dict[str, str]] = {}

    def run(command: list[str], **options: dict[str, str]) -> subprocess.CompletedProcess[str]:
        started.update(options)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(sanitize, "compute_sanitizer", lambda: "compute-sanitizer")
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", run)
        sanitize.run_under(tool, [], None, 1.0)
    program = (
        "import torch; from gpu.cases import ORACLE_DEVICE, poisoned_memory\n"
        "with poisoned_memory(): print(ORACLE_DEVICE, torch.are_deterministic_algorithms_enabled())"
    )
    marks = {name: value for name, value in started["env"].items() if name in MARKS}
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **marks},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert shown == [oracle_device, fills]


def test_run_that_is_cut_off_keeps_what_was_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '========= Invalid __global__ write'\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "compute_sanitizer", lambda: str(tool))
    report = sanitize.run_under("memcheck", [], None, 1.0)
    assert "Invalid __global__ write" in report.text
    assert report.broke_off is not None and "ran past 1 s" in report.broke_off
