"""Loads the second compiled library, in which Python sees the hooks of the first."""

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import torch

from torch_moe_ep import _library  # noqa: F401  loads the operators, which the hooks link
from torch_moe_ep._build_info import (
    hooks_path,
    library_path,
    read_build_info,
    rebuild_command,
    why_hooks_unusable,
)


def load(path: Path) -> Any:
    """Load the library and return its module.

    Raises:
        ImportError: it is missing, built for another Python, or does not load; the message holds
            the command that rebuilds it.
    """
    reason = why_hooks_unusable(path)
    if reason is not None:
        raise ImportError(reason)
    loader = importlib.machinery.ExtensionFileLoader("torch_moe_ep._hooks", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        built = read_build_info(library_path(path.parent)).torch
        raise ImportError(
            f"torch_moe_ep's hooks were built for torch {built}, found {torch.__version__}, and do "
            f"not load ({error}): rebuild with `{rebuild_command(path.parent)}`"
        ) from error
    return module


native: Any = load(hooks_path())
