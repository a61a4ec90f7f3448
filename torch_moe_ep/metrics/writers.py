"""Where records go: JSON lines, TensorBoard. A writer is anything that takes a record."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

LAYER_SCALARS = ("imbalance", "entropy", "dropped_share", "z_loss", "aux_loss")


class JsonLines:
    """Appends each record to a file as one line of JSON, at once.

    Args:
        path: of the file; its folder is made.
        append: keep what is there; False starts anew.
    """

    def __init__(self, path: Path, *, append: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if append:
            _end_line(path)
        self.lines = path.open("a" if append else "w", buffering=1, encoding="utf-8")

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        self.lines.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.lines.close()


class Board(Protocol):
    """What is used of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """One number of one step."""


class TensorBoard:
    """Writes each record's numbers: ``Experts/imbalance/<layer>``, ``Traffic/<stage>/bytes``, ...

    Args:
        board: a SummaryWriter; stays open.
    """

    def __init__(self, board: Board) -> None:
        self.board = board

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        step = record["step"]
        self.board.add_scalar("Experts/imbalance/worst", record["imbalance"], step)
        for name, layer in record["layers"].items():
            for key in LAYER_SCALARS:
                if key in layer:
                    self.board.add_scalar(f"Experts/{key}/{name}", layer[key], step)
        for row in record["traffic"]:
            for key in ("bytes", "milliseconds"):
                tag = f"Traffic/{row['group']}/{row['stage']}/{key}"
                self.board.add_scalar(tag, row[key], step)


def _end_line(path: Path) -> None:
    """End the line that a killed run left half-written, so that only that one is lost."""
    if path.exists() and path.stat().st_size > 0:
        with path.open("rb+") as lines:
            lines.seek(-1, 2)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
