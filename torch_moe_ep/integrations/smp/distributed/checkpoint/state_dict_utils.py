"""``state_dict_utils``: a dead path of SMP scripts; every name says that it is not supported."""

from typing import Any

from torch_moe_ep.integrations.smp.not_supported import NotSupportedError


def __getattr__(name: str) -> Any:
    """Raise `NotSupportedError` for every name but Python's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    reason = "state dicts are torch's own; use torch.distributed.checkpoint.state_dict."
    raise NotSupportedError(f"distributed.checkpoint.state_dict_utils.{name}", reason)
