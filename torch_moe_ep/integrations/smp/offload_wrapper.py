"""``offload_wrapper``: torch's wrapper that keeps saved activations in host memory."""

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    OffloadWrapper,
    offload_wrapper,
)

__all__ = ["OffloadWrapper", "offload_wrapper"]
