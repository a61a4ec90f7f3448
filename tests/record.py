"""Runs tests and writes their outcome as a result file of ``benchmarks/results``.

    python -m tests.record --output benchmarks/results/<date>-gpu-tests.json tests/gpu
    python -m tests.record --output benchmarks/results/<date>-test-full.json -m full tests

What stands behind the options goes to pytest. A run that is ended by SIGTERM, as `timeout` does,
keeps what it has.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

import pytest

from benchmarks import common


class Outcomes:
    """A pytest plugin that keeps one row per test."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the call phase, and of the others only what did not pass."""
        if report.when != "call" and report.outcome == "passed":
            return
        row: dict[str, object] = {
            "name": "test",
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


def main() -> int:
    """Runs pytest and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default="", help="where there is no git checkout")
    options, pytest_arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # pytest ends its session on it
    outcomes = Outcomes()
    status = pytest.main(["-q", *pytest_arguments], plugins=[outcomes])
    target = f"benchmarks/results/{options.output.name}"
    command = shlex.join(["python", "-m", "tests.record", "--output", target, *pytest_arguments])
    head = {**common.machine(options.commit), "command": command}
    common.write(options.output, {**head, "rows": list(outcomes.rows.values())})
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
