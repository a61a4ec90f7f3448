"""Training steps on 1, 2, 4, ... GPUs of a host, all of them the expert-parallel group.

    python -m benchmarks.scaling --plot      # two layers of 8x7B

Weak scaling keeps the batch of a GPU, strong scaling the batch of all. The efficiency is tokens per
second over the number of GPUs times one GPU's; above 1 where the optimizer's part, which is split
over the GPUs, weighs much on one. Model and steps are those of benchmarks.train.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.step import OURS
from benchmarks.train import Case, add_arguments, case_of, run_pair

LAYERS = 2
EFFICIENCY = "of linear scaling"


def sizes(ranks: int) -> list[int]:
    """Powers of two up to the number of ranks: [1, 2, 4] for 4 and for 6."""
    return [1 << power for power in range(int(math.log2(ranks)) + 1)]


def scaling(case: Case) -> list[dict[str, Any]]:
    """Rows of both kinds of scaling; `case` is of the most ranks."""
    rows: list[dict[str, Any]] = []
    for kind in ("weak", "strong"):
        alone = 0.0
        for ranks in sizes(case.ranks):
            batch = case.batch if kind == "weak" else case.batch * case.ranks // ranks
            found = run_pair(replace(case, ranks=ranks, batch=batch), [OURS])
            rate = next(row["value"] for row in found if row["unit"] == "tokens/s")
            alone = alone or rate
            efficiency = {"value": round(rate / alone / ranks, 4), "unit": EFFICIENCY}
            rows += [{**row, "case": f"{kind} scaling, {row['case']}"} for row in found]
            rows.append({**rows[-1], **efficiency})
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per second by the number of GPUs, and what linear scaling would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for kind in ("weak", "strong"):
        rates = [
            row["value"]
            for row in rows
            if row["case"].startswith(kind) and row["unit"] == "tokens/s"
        ]
        gpus = [1 << power for power in range(len(rates))]
        (line,) = axes.plot(gpus, rates, "o-", label=f"{kind} scaling")
        axes.plot(gpus, [rates[0] * g for g in gpus], ":", color=line.get_color(), linewidth=1)
    axes.set_xticks(gpus)
    axes.set(xlabel="GPUs (dotted: linear)", ylabel="tokens/s", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Run every size and keep the result file and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    rows = scaling(case_of(arguments, LAYERS))
    wants_plot, arguments.plot = arguments.plot, False  # of another kind than the others'
    path = common.finish("scaling", rows, arguments)
    if wants_plot:
        draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
