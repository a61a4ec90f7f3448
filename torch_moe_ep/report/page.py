"""One HTML file with everything in it: no script, nothing fetched, readable without a network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from torch_moe_ep.report.figures import Picture
from torch_moe_ep.report.read import Run

STYLE = """
:root { color-scheme: light dark;
  --ink: #1c2530; --dim: #5b6875; --line: #d8dee5; --back: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --dim: #9aa7b4; --line: #313b46; --back: #14191f; }
}
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; color: var(--ink);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 0 0 .4rem; }
.dim { color: var(--dim); font-size: .9rem; margin: .2rem 0 1.2rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; padding: 0; margin: 0 0 1.4rem;
  list-style: none; }
.facts li { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem;
  min-width: 8rem; }
.facts b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.facts span { color: var(--dim); font-size: .85rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(32rem, 100%), 1fr));
  gap: 1rem; align-items: start; }
section { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; overflow: auto; }
section:has(table) { max-height: 60rem; }
section p { color: var(--dim); font-size: .9rem; margin: .5rem 0 0; }
img { width: 100%; height: auto; background: #fff; border-radius: 4px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
"""


def write_page(run: Run, pictures: Sequence[Picture]) -> Path:
    """Write ``report.html`` into the run's folder; returns its path."""
    title = f"Run {escape(run.name)}"
    figures = "\n".join(_figure(picture) for picture in pictures)
    tables = "\n".join(table for table in (_layer_table(run), _traffic_table(run)) if table)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="dim">{escape(_subtitle(run))}</p>
<ul class="facts">
{"".join(f"<li><b>{escape(value)}</b><span>{escape(name)}</span></li>" for name, value in _facts(run))}
</ul>
<div class="grid">
{figures}
{tables}
</div>
</body>
</html>
"""  # noqa: E501
    path = run.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _subtitle(run: Run) -> str:
    text = f"{run.num_steps} steps"
    if run.layers:
        text += f", {len(run.layers)} expert layers of {len(run.load[0][0])} experts"
    if run.num_unreadable:
        text += f"; {run.num_unreadable} unreadable line(s) left out"
    return text


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = [("steps", f"{run.num_steps:,}")]
    last = (("loss", "last loss"), ("validation_loss", "last loss on held-out text"))
    for name, label in last:
        if name in run.curves:
            facts.append((label, f"{run.curves[name][1][-1]:.4f}"))
    if "grad_norm" in run.curves:
        facts.append(("last gradient norm", f"{run.curves['grad_norm'][1][-1]:.3g}"))
    if "tokens_per_second" in run.curves:
        facts.append(
            ("tokens a second, median", f"{median(run.curves['tokens_per_second'][1]):,.0f}")
        )
    if run.load:
        worst = max(max(layer) for layer in run.load[-1])
        facts.append(("worst imbalance, last step", f"{worst:.2f}"))
    return facts


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    title, caption = escape(picture.title), escape(picture.caption)
    return (
        f'<section><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}">'
        f"<p>{caption}</p></section>"
    )


def _layer_table(run: Run) -> str:
    if not run.load:
        return ""
    last = run.load[-1]
    columns = {
        "layer": list(run.layers),
        "busiest expert": [f"{max(load):.2f}" for load in last],
        "idlest expert": [f"{min(load):.2f}" for load in last],
    }
    for head, values in (("router entropy", run.entropy), ("dropped share", run.dropped_share)):
        if any(value is not None for value in values[-1]):
            columns[head] = ["" if value is None else f"{value:.3f}" for value in values[-1]]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return _table(f"Layers at step {run.load_steps[-1]}", list(columns), rows)


def _traffic_table(run: Run) -> str:
    rows = []
    for (group, stage), total in run.traffic.items():
        timed = total["timed_calls"]
        per_call = f"{total['milliseconds'] / timed:.3f}" if timed else ""
        megabytes = f"{total['bytes'] / 1e6:,.1f}"
        rows.append([f"{group}: {stage}", f"{total['calls']:,.0f}", megabytes, per_call])
    if not rows:
        return ""
    return _table("Traffic of rank 0", ["stage", "calls", "MB", "ms a call"], rows)


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [f"<section><h2>{escape(title)}</h2><table><tr>"]
    lines += [f"<th>{escape(cell)}</th>" for cell in head]
    for row in rows:
        lines.append("</tr><tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row))
    return "".join(lines) + "</tr></table></section>"
