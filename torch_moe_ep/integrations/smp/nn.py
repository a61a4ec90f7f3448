"""``nn``: a dead path of SMP scripts; every name of it says that it is not supported."""

from typing import Any

from torch_moe_ep.integrations.smp.not_supported import NotSupportedError


def __getattr__(name: str) -> Any:
    """Raise `NotSupportedError` for every name but Python's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    reason = "fp8 and tensor-parallel layers are not implemented; the Hugging Face modules stay."
    raise NotSupportedError(f"nn.{name}", reason)
