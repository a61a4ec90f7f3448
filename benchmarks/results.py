"""Prints result files: `python -m benchmarks.results [--plot] [FILES]`; all files by default.

`--readme` rewrites what stands between the markers of README, from the newest layer files, one for
GPUs and one for CPUs, and of docs/performance.md, from the newest file of every benchmark; a test
checks that both are up to date.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import performance_page
from benchmarks.result_files import FIXED, RESULTS_DIR, between_markers, newest_files, read

DENSE = "dense GEMM"  # the candidate that ratio_to_dense refers to
README = Path(__file__).parent.parent / "README.md"


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay rows out as text in columns, rows of one case together."""
    extra = list(dict.fromkeys(key for row in rows for key in row if key not in FIXED))
    columns = ["case", "name", "value", "unit", *extra]
    cells = [columns] + [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[idx]) for line in cells) for idx in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _text(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def plot(path: Path) -> Path:
    """Draw every speed of a result file as bars by case; return the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = read(path)
    speeds = [row for row in result["rows"] if isinstance(row["value"], int | float)]
    units = list(dict.fromkeys(row["unit"] for row in speeds))
    figure, all_axes = pyplot.subplots(
        len(units), figsize=(9, 1 + 0.28 * len(speeds)), squeeze=False, layout="constrained"
    )
    for axes, unit in zip(all_axes[:, 0], units, strict=True):
        rows = [row for row in speeds if row["unit"] == unit][::-1]
        axes.barh([f"{row['case']}: {row['name']}" for row in rows], [row["value"] for row in rows])
        axes.set_xlabel(unit)
        axes.grid(axis="x", alpha=0.3)
    machine = result["gpu"] if result["gpu"] != "none" else f"CPU, torch {result['torch']}"
    figure.suptitle(f"{path.stem} ({machine})")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target


def readme_tables() -> str:
    """Markdown tables of the newest layer results, or one sentence where there are none."""
    files = newest_files()
    names = [name for name in sorted(files) if name.partition("-")[0] == "layer"]
    names.sort(key=lambda name: name.endswith("-cpu"))
    tables = [_markdown(files[name]) for name in names]
    return "\n\n".join(tables) or "No result file is in the repository yet."


def _markdown(path: Path) -> str:
    """One line a case, one column a candidate: the ratio to the dense GEMM of the same loop."""
    result = read(path)
    where = result["gpu"] if result["gpu"] != "none" else f"CPU, {result['cpu_threads']} threads"
    speeds = [row for row in result["rows"] if "ratio_to_dense" in row]
    names = list(dict.fromkeys(row["name"] for row in speeds))
    names.sort(key=lambda name: (name != DENSE, not name.startswith("torch_moe_ep")))
    cells = {
        (row["case"], row["name"]): (
            f"{row['value']:.0f} {row['unit']}" if row["name"] == DENSE else row["ratio_to_dense"]
        )
        for row in speeds
    }
    command = f"python -m benchmarks.results benchmarks/results/{path.name}"
    lines = [
        f"{where}, torch {result['torch']}: `{result['command']}`; `{command}` prints it whole.",
        "",
        f"| case | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for case in dict.fromkeys(row["case"] for row in speeds):
        ratios = " | ".join(str(cells.get((case, name), "")) for name in names)
        lines.append(f"| {case} | {ratios} |")
    return "\n".join(lines)


def readme_with_tables() -> str:
    """README's text with the tables of the newest results between the markers."""
    return between_markers(README.read_text(), readme_tables())


def main() -> None:
    """Print each file's head and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--plot", action="store_true", help="write a PNG beside each file")
    parser.add_argument(
        "--readme", action="store_true", help="rewrite the tables of README and docs/performance.md"
    )
    arguments = parser.parse_args()
    if arguments.readme:
        README.write_text(readme_with_tables())
        performance_page.PAGE.write_text(performance_page.page_with_tables())
        return
    for path in arguments.files or sorted(RESULTS_DIR.glob("*.json")):
        result = read(path)
        head = {key: value for key, value in result.items() if key != "rows"}
        print(f"{path.name}: " + ", ".join(f"{key} {value}" for key, value in head.items()))
        print(format_table(result["rows"]) + "\n")
        if arguments.plot:
            print(f"plotted to {plot(path)}\n")


if __name__ == "__main__":
    main()
