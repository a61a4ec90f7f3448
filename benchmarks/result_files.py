"""Result files, and the place of their tables in a page."""

import json
from pathlib import Path
from typing import Any

RESULTS_DIR = Path(__file__).parent / "results"
FIXED = ("name", "case", "value", "unit")
MARKERS = ("<!-- results:begin -->", "<!-- results:end -->")


def read(path: Path) -> dict[str, Any]:
    """Read one result file.

    Raises:
        ValueError: a field of the format is missing.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    wanted = ("date", "commit", "gpu", "driver", "torch", "cuda", "power_limit_w", "command")
    missing = [field for field in (*wanted, "rows") if field not in result]
    if missing:
        raise ValueError(f"{path} is no result file: {', '.join(missing)} missing.")
    for row in result["rows"]:
        if not set(FIXED) <= set(row):
            raise ValueError(f"{path}: a row needs {', '.join(FIXED)}, got {sorted(row)}.")
    return result


def newest_files() -> dict[str, Path]:
    """The newest file of each name: "layer" of 2026-11-25-layer.json and its predecessors."""
    paths = sorted(RESULTS_DIR.glob("????-??-??-*.json"))
    return {path.stem.split("-", 3)[3]: path for path in paths}


def between_markers(text: str, tables: str) -> str:
    """Replace what stands between a page's markers."""
    before, rest = text.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    return f"{before}{MARKERS[0]}\n{tables}\n{MARKERS[1]}{after}"
