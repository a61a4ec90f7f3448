"""``python -m torch_moe_ep.report runs/<name>``: curves and heat maps as PNG and one HTML page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_moe_ep.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print where it is; exit status 2 where there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m torch_moe_ep.report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder with history.jsonl or experts.jsonl")
    folder = parser.parse_args(argv).run
    try:
        files = write_report(folder)
    except (ValueError, ImportError) as error:
        print(f"torch_moe_ep.report: {error}", file=sys.stderr)
        return 2
    print(f"{files[-1]} and {', '.join(path.name for path in files[:-1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
