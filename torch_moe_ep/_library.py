"""Loads the operator library that setup.py built for the torch that is imported.

Importing this module loads it; the library then registers its operators with torch, and nothing in
it is called from here.
"""

from __future__ import annotations

from pathlib import Path

import torch

from torch_moe_ep._build_info import library_path, read_build_info, rebuild_command, why_unusable


def load(library: Path) -> None:
    """Loads the library; a second time has no effect.

    Args:
        library: the file; the note of its build lies beside it.

    Raises:
        ImportError: it is missing, built for another torch or does not load; the message holds
            the command that rebuilds it.
    """
    reason = why_unusable(library)
    if reason is not None:
        raise ImportError(reason)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"torch_moe_ep was built for torch {read_build_info(library).torch}, found "
            f"{torch.__version__}, and does not load ({error}): "
            f"rebuild with `{rebuild_command(library.parent)}`"
        ) from error


load(library_path())
