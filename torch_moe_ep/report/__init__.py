"""Pictures and a page of a run: ``python -m torch_moe_ep.report runs/<name>``.

read       history.jsonl and experts.jsonl of a run's folder
figures    curves and heat maps as PNG
page       one HTML file that needs nothing beside it
"""

from pathlib import Path

from torch_moe_ep.report.read import Run, read_run

__all__ = ["Run", "read_run", "write_report"]


def write_report(folder: Path) -> list[Path]:
    """Draw what a run has recorded, into its folder.

    Args:
        folder: with ``history.jsonl``, ``experts.jsonl`` or both (`read_run` has the fields).

    Returns:
        The files written: a PNG each for what was recorded, and ``report.html`` last.

    Raises:
        ValueError: nothing was recorded in the folder.
        ImportError: matplotlib is missing.
    """
    try:
        from torch_moe_ep.report.figures import draw
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install matplotlib") from error
    from torch_moe_ep.report.page import write_page

    run = read_run(folder)
    pictures = draw(run)
    return [*(picture.path for picture in pictures), write_page(run, pictures)]
