"""What a run has recorded: JSON lines, in whole or up to where it was killed.

``history.jsonl`` holds objects with ``step`` and any of ``loss``, ``lr``, ``grad_norm``,
``tokens_per_second``, ``seconds``, ``validation_loss``; one object may have ``reference_losses``,
name to a loss that is drawn as a line. ``experts.jsonl`` holds the records of `metrics.Recorder`.
A step that stands twice (a run that was resumed) counts as it was the last time.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"
EXPERTS = "experts.jsonl"
HISTORY_FIELDS = ("loss", "lr", "grad_norm", "tokens_per_second", "seconds", "validation_loss")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where it lies.
        curves: name to (steps, values), in the order of steps; only what was recorded.
        reference_losses: name to loss.
        load_steps: steps of the records of experts.
        layers: names of the layers.
        load: a matrix ``[layers][experts]`` a record, copies over an even share.
        entropy: a list ``[layers]`` a record, in nats; None for a layer without.
        dropped_share: the same of dropped copies.
        traffic: (group, stage) to calls, bytes, milliseconds and timed calls, of all records.
        num_unreadable: lines that are no JSON, such as the last one of a killed run.
    """

    folder: Path
    curves: dict[str, tuple[list[int], list[float]]]
    reference_losses: dict[str, float]
    load_steps: list[int] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    load: list[list[list[float]]] = field(default_factory=list)
    entropy: list[list[float | None]] = field(default_factory=list)
    dropped_share: list[list[float | None]] = field(default_factory=list)
    traffic: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    num_unreadable: int = 0

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def num_steps(self) -> int:
        """Steps that have been done: they count from 0, validation stands after so many."""
        done = [steps[-1] + (name != "validation_loss") for name, (steps, _) in self.curves.items()]
        return max([*done, *(step + 1 for step in self.load_steps[-1:])], default=0)


def read_run(folder: Path) -> Run:
    """Read what a run has recorded.

    Raises:
        ValueError: there is nothing to read, or records of another kind.
    """
    history, num_bad = _json_lines(folder / HISTORY)
    records, num_bad_records = _json_lines(folder / EXPERTS)
    if not history and not records:
        raise ValueError(
            f"{folder} holds neither {HISTORY} nor {EXPERTS} with a record in it; "
            f"torch_moe_ep.metrics.JsonLines and Recorder write them."
        )
    references: dict[str, float] = {}
    for line in history:
        references.update(line.get("reference_losses", {}))
    return Run(
        folder,
        _curves(history),
        references,
        num_unreadable=num_bad + num_bad_records,
        **_expert_fields(records),
    )


def _json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    if not path.exists():
        return [], 0
    found, num_bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            num_bad += 1
    return found, num_bad


def _curves(history: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for name in HISTORY_FIELDS:
        points = {line["step"]: line[name] for line in history if "step" in line and name in line}
        if points:
            steps = sorted(points)
            curves[name] = (steps, [float(points[step]) for step in steps])
    return curves


def _expert_fields(records: list[dict[str, Any]]) -> dict[str, Any]:
    last = {record["step"]: record for record in records if "layers" in record}
    if not last:
        return {}
    steps = sorted(last)
    layers = list(last[steps[-1]]["layers"])
    kept = [last[step] for step in steps]
    for record in kept:
        if list(record["layers"]) != layers:
            raise ValueError(
                f"step {record['step']} has other layers than step {steps[-1]}: {EXPERTS} holds "
                f"the records of several models; keep each run in a folder of its own."
            )
    return {
        "load_steps": steps,
        "layers": layers,
        "load": [[_shares(record["layers"][name]["tokens"]) for name in layers] for record in kept],
        "entropy": [[record["layers"][n].get("entropy") for n in layers] for record in kept],
        "dropped_share": [
            [record["layers"][n].get("dropped_share") for n in layers] for record in kept
        ],
        "traffic": _traffic(kept),
    }


def _shares(tokens: list[int]) -> list[float]:
    """Copies over an even share; 1 everywhere where there were none."""
    total = sum(tokens)
    return [count * len(tokens) / total if total else 1.0 for count in tokens]


def _traffic(records: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    totals: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        for row in record.get("traffic", []):
            total = totals.setdefault((row["group"], row["stage"]), {})
            for key in ("calls", "bytes", "milliseconds", "timed_calls"):
                total[key] = total.get(key, 0) + row[key]
    return totals
