"""Timing of candidates turn about, the machine's description, and result files.

A GPU under sustained load is limited by power and slows down as it warms, so a short benchmark
flatters whoever runs first. Here candidates alternate in turns, each gets at least `min_seconds`
in all, and every figure is also given as a ratio to a dense GEMM that takes part in the same loop.
"""

import argparse
import datetime
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import profile

from benchmarks.result_files import RESULTS_DIR
from benchmarks.results import DENSE, format_table, plot


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        name: as printed.
        run: does the work once; on a GPU it only enqueues.
        work: FLOPs or bytes of one run; the figure is work over time.
    """

    name: str
    run: Callable[[], object]
    work: float


@dataclass(frozen=True)
class Timing:
    """Rates of one candidate in work per second, one for each turn."""

    candidate: Candidate
    rates: tuple[float, ...]
    runs: int

    @property
    def rate(self) -> float:
        """Median over the turns."""
        return statistics.median(self.rates)

    def ratios(self, reference: "Timing") -> tuple[float, float, float]:
        """(min, median, max) over the turns of this rate to the reference's in the same turn."""
        ratios = [rate / other for rate, other in zip(self.rates, reference.rates, strict=True)]
        return min(ratios), statistics.median(ratios), max(ratios)


def time_turn_about(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    min_seconds: float = 1.0,
    turns: int = 3,
    lead_in: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[Timing]:
    """Time candidates in alternation.

    Each candidate runs once to warm up and once to learn how long it takes; then in each turn
    every candidate runs often enough that all its turns together last `min_seconds`. On a GPU the
    first candidate runs for as long before the first turn: a card that has not reached its power
    limit yet shows rates that it does not keep. Each candidate also runs unmeasured for `lead_in`
    seconds right before what is measured of it (default 0.3, on a CPU 0): a card at its power limit
    runs on for as long at the clock that the candidate before it left.

    With a `group` its ranks time together (collective): they agree on the number of runs and meet
    before each turn; each returns its own rates.

    Returns:
        One Timing a candidate, in order.
    """
    if lead_in is None:
        lead_in = 0.3 if device.type == "cuda" else 0.0
    runs_of: list[tuple[int, int]] = []  # unmeasured and measured, in a turn
    for candidate in candidates:
        candidate.run()
        seconds = max(_seconds(candidate.run, 1, device), 1e-6)
        measured = max(1, round(min_seconds / turns / seconds + 0.5))
        runs_of.append((math.ceil(lead_in / seconds), measured))
    if group is not None:
        agreed = [runs_of]
        dist.broadcast_object_list(agreed, src=dist.get_global_rank(group, 0), group=group)
        runs_of = agreed[0]
    if device.type == "cuda":
        _seconds(candidates[0].run, runs_of[0][1] * turns, device)
    rates: list[list[float]] = [[] for _ in candidates]
    for _ in range(turns):
        for candidate, (unmeasured, num_runs), found in zip(
            candidates, runs_of, rates, strict=True
        ):
            if group is not None:
                dist.barrier(group)
            for _ in range(unmeasured):
                candidate.run()
            found.append(candidate.work * num_runs / _seconds(candidate.run, num_runs, device))
    return [
        Timing(candidate, tuple(found), num_runs * turns)
        for candidate, found, (_, num_runs) in zip(candidates, rates, runs_of, strict=True)
    ]


def slowest(timings_by_rank: Sequence[Sequence[Timing]]) -> list[Timing]:
    """One Timing a candidate: in each turn the rate of the slowest rank, which all wait for."""
    return [
        Timing(
            of_ranks[0].candidate,
            tuple(min(rates) for rates in zip(*(t.rates for t in of_ranks), strict=True)),
            of_ranks[0].runs,
        )
        for of_ranks in zip(*timings_by_rank, strict=True)
    ]


def _seconds(run: Callable[[], object], num_runs: int, device: torch.device) -> float:
    """Duration of `num_runs` runs: device events on a GPU, the wall clock on a CPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(num_runs):
            run()
        return time.perf_counter() - started
    torch.cuda.synchronize(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_runs):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def trace_events(profiled: profile) -> list[dict[str, Any]]:
    """The events of a profile as in its Chrome trace, which knows streams and grids."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def dense_gemm(device: torch.device, dtype: torch.dtype) -> Candidate:
    """A square GEMM of random normal data: 8192 on a GPU, 2048 on a CPU."""
    size = 8192 if device.type == "cuda" else 2048
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    product = torch.empty_like(left)
    return Candidate(DENSE, lambda: torch.mm(left, right, out=product), 2.0 * size**3)


def copy(device: torch.device, num_bytes: int) -> Candidate:
    """A device-to-device copy; bytes read plus bytes written."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return Candidate("copy", lambda: target.copy_(source), 2.0 * source.numel() * 4)


def relative_error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    """max|actual - oracle| / max|oracle| on the device; NaN if any element is.

    Slice by slice: a whole result in fp32 would double the memory, and on the CPU large ones take
    longer than what is timed.
    """
    pairs = zip(actual.split(1024), oracle.split(1024), strict=True)
    if actual.dim() == 3:
        pairs = zip(actual, oracle, strict=True)
    largest = torch.stack([(a.float() - o.float()).abs().max() for a, o in pairs]).max()
    return float(largest / oracle.abs().max())


def speed_rows(
    timings: Sequence[Timing], case: str, unit: str, scale: float, reference: str = DENSE
) -> list[dict[str, Any]]:
    """Turn timings into result rows; `reference` names the candidate that ratios refer to."""
    base = next(timing for timing in timings if timing.candidate.name == reference)
    ratio_name = "ratio_to_dense" if reference == DENSE else f"ratio_to_{reference}"
    rows = []
    for timing in timings:
        low, middle, high = timing.ratios(base)
        rows.append(
            {
                "name": timing.candidate.name,
                "case": case,
                "value": round(timing.rate / scale, 2),
                "unit": unit,
                ratio_name: round(middle, 4),
                "ratio_min": round(low, 4),
                "ratio_max": round(high, 4),
                "runs": timing.runs,
            }
        )
    return rows


def machine(commit: str = "") -> dict[str, Any]:
    """Return the fields that every result file begins with, but the command."""
    query = "--query-gpu=name,driver_version,power.limit"
    described = _output_of("nvidia-smi", query, "--format=csv,noheader,nounits").split(", ")
    gpu, driver, power = described if len(described) == 3 else ("none", "", "")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit or _output_of("git", "rev-parse", "HEAD"),
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "power_limit_w": float(power) if power else None,
        "cpu_threads": torch.get_num_threads(),
    }


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of benchmarks that time turn about."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--min_seconds", type=float, default=1.0, help="work per figure")
    parser.add_argument("--turns", type=int, default=3, help="turns per candidate")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `finish` reads."""
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/<date>-<name>.json"
    )
    parser.add_argument("--commit", default="", help="where there is no git checkout")
    parser.add_argument("--plot", action="store_true", help="write a PNG beside the result file")


def finish(name: str, rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> Path:
    """Print the rows as a table, write (or merge into) the result file, plot; return its path."""
    print(format_table(rows))
    path = write_results(name, rows, arguments.output, arguments.commit)
    print(f"written to {path}")
    if arguments.plot:
        print(f"plotted to {plot(path)}")
    return path


def write_results(
    name: str,
    rows: Sequence[dict[str, Any]],
    path: Path | None = None,
    commit: str = "",
    module: str = "",
) -> Path:
    """Write benchmarks/results/<date>-<name>.json (CPU runs: <date>-<name>-cpu.json).

    A file that is already there from the same commit and GPU is merged into: rows of the same
    (name, case, unit) are replaced, so a grid may be split over several runs. Any other file
    there is kept and the new one gets the commit's first letters in its name. `module`: what was
    run, default benchmarks.<name>.
    """
    head = {**machine(commit), "command": _command_of(module or f"benchmarks.{name}")}
    suffix = "" if head["gpu"] != "none" else "-cpu"
    path = path or RESULTS_DIR / f"{head['date']}-{name}{suffix}.json"
    if path.exists():
        old = json.loads(path.read_text())
        if (old["commit"], old["gpu"]) != (head["commit"], head["gpu"]):
            path = path.with_stem(f"{path.stem}-{head['commit'][:8]}")
            return write_results(name, rows, path, commit, module)
        return _merge(path, old, head, rows)
    write(path, {**head, "rows": list(rows)})
    return path


def _command_of(module: str) -> str:
    """The command that measures the same, wherever the file goes."""
    words = ["python", "-m", module]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word in ("--output", "--commit", "--logs"):
            next(arguments, None)
        else:
            words.append(word)
    return shlex.join(words)


def _merge(
    path: Path, old: dict[str, Any], head: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> Path:
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["name"], row["case"], row["unit"]

    replaced = {key(row) for row in rows}
    kept = [row for row in old["rows"] if key(row) not in replaced]
    commands = old["command"].split(" && ")
    if head["command"] not in commands:
        commands.append(head["command"])
    write(path, {**head, "command": " && ".join(commands), "rows": [*kept, *rows]})
    return path


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
