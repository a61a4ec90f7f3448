"""The tables of docs/performance.md: the newest result file of each benchmark on each machine."""

import ast
from pathlib import Path
from typing import Any

from benchmarks.result_files import between_markers, newest_files, read

MAX_COLUMNS = 8  # what a page is wide
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def tables() -> str:
    """One section for each kind of result file that a benchmark of this folder writes."""
    files = {name: path for name, path in newest_files().items() if _program(name).is_file()}
    return "\n\n".join(_section(name, path) for name, path in sorted(files.items()))


def page_with_tables() -> str:
    """The page's text with the newest tables between the markers."""
    return between_markers(PAGE.read_text(), tables())


def _program(name: str) -> Path:
    """The benchmark that writes ``<date>-<name>.json``: "layer-cpu" is of benchmarks/layer.py."""
    return Path(__file__).parent / f"{name.partition('-')[0]}.py"


def _section(name: str, path: Path) -> str:
    result = read(path)
    purpose = (ast.get_docstring(ast.parse(_program(name).read_text())) or "").partition("\n")[0]
    parts = [f"## {name}", f"{purpose} {_machine(result)}."]
    if result.get("note"):
        parts.append(f"{result['note'][0].upper()}{result['note'][1:]}.")
    parts.append(_table(result["rows"]))
    parts.append(
        f"[{path.name}](../benchmarks/results/{path.name}), commit {result['commit'][:7]}: "
        f"`{result['command']}`"
    )
    return "\n\n".join(parts)


def _machine(result: dict[str, Any]) -> str:
    parts = [f"torch {result['torch']}", result["date"]]
    if result["gpu"] == "none":
        return ", ".join([f"CPU, {result['cpu_threads']} threads", *parts])
    return ", ".join([result["gpu"], f"driver {result['driver']}", *parts])


def _table(rows: list[dict[str, Any]]) -> str:
    """A line for each case and unit, a column for each candidate; if many, the other way round."""
    is_wide = len({row["name"] for row in rows}) > MAX_COLUMNS
    down, across = ("name", "unit") if is_wide else ("unit", "name")
    heads = list(dict.fromkeys(row[across] for row in rows))
    cells = {(row["case"], row[down], row[across]): _value(row) for row in rows}
    keys = dict.fromkeys((row["case"], row[down]) for row in rows)
    lines = [[*key, *(cells.get((*key, head), "") for head in heads)] for key in keys]
    return _markdown(["case", "candidate" if is_wide else "unit", *heads], lines)


def _value(row: dict[str, Any]) -> str:
    """A row's value, and in brackets its ratio to what the benchmark compares with."""
    value = row["value"]
    if not isinstance(value, int | float):
        return str(value)
    ratios = [ratio for key, ratio in row.items() if key.startswith("ratio_to_")]
    text = f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{text} ({ratios[0]:.2f})" if ratios and ratios[0] is not None else text


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    ruler = "|---" * len(heads) + "|"
    return "\n".join([f"| {' | '.join(heads)} |", ruler, *(f"| {' | '.join(r)} |" for r in lines)])
