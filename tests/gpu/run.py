"""Runs the GPU tests and writes their outcome as a result file of ``benchmarks/results``.

``python -m tests.gpu.run --output benchmarks/results/<date>-gpu-tests.json [pytest arguments]``
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch


class Outcomes:
    """A pytest plugin that keeps one row per test."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the call phase, and of the others only what did not pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        row: dict[str, object] = {
            "name": "gpu test",
            "case": report.nodeid,
            "value": round(report.duration, 3),
            "unit": "s",
            "outcome": report.outcome,
        }
        if report.outcome == "failed":
            row["message"] = str(report.longrepr).strip().splitlines()[-1][:300]
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            row["message"] = str(report.longrepr[-1])
        self.rows[report.nodeid] = row


def output_of(*command: str) -> str:
    """The first line a program prints, or an empty string where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def machine(commit: str, command: list[str]) -> dict[str, object]:
    """The fields that every result file begins with."""
    query = "--query-gpu=name,driver_version,power.limit"
    described = output_of("nvidia-smi", query, "--format=csv,noheader,nounits").split(", ")
    gpu, driver, power = described if len(described) == 3 else ("none", "", "")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit or output_of("git", "rev-parse", "HEAD"),
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "power_limit_w": float(power) if power else None,
        "command": shlex.join(["python", "-m", "tests.gpu.run", *command]),
    }


def main() -> int:
    """Runs pytest over this folder and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default="", help="where there is no git checkout")
    options, pytest_arguments = parser.parse_known_args()
    outcomes = Outcomes()
    folder = str(Path(__file__).parent)
    status = pytest.main(["-q", folder, *pytest_arguments], plugins=[outcomes])
    command = ["--output", f"benchmarks/results/{options.output.name}", *pytest_arguments]
    result = {**machine(options.commit, command), "rows": list(outcomes.rows.values())}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
