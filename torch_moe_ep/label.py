"""The layer whose forward runs, for the hooks' reports and counters.

Until a group has hooks nothing is set, and asking costs a comparison. Stages name themselves in
C++; backward takes its layer from the forward.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

_native: Any = None


def enable() -> None:
    """Set labels from here on. Local."""
    global _native
    from torch_moe_ep.hooks.library import native

    _native = native


def disable() -> None:
    """Set no labels from here on, as before the first `enable`. Local."""
    global _native
    _native = None


def is_enabled() -> bool:
    """Whether labels are set: a group of this process has had hooks."""
    return _native is not None


def layer_id(name: str) -> int:
    """A number for a layer's name; needs `enable`."""
    found: int = _native.intern_layer(name)
    return found


def exchange(layer: int, stage: int = 0) -> tuple[int, int]:
    """Set this thread's layer and stage and return those before; needs `enable`."""
    before: tuple[int, int] = _native.exchange_label(layer, stage)
    return before


def current_layer() -> int:
    """The current layer of this thread; 0 for none, and before `enable`."""
    return int(_native.current_layer()) if _native is not None else 0


@contextlib.contextmanager
def stage(name: str, layer: int) -> Iterator[None]:
    """Label what a scope of Python code exchanges itself."""
    if _native is None:
        yield
        return
    before = exchange(layer, _native.intern_stage(name))
    try:
        yield
    finally:
        exchange(*before)
