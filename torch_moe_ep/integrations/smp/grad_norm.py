"""``grad_norm.clip_grad_norm_``."""

import torch
from torch import nn

from torch_moe_ep.parallel.grad_norm import clip_grad_norm_ as _clip_grad_norm_


def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Clip the gradients of a model, perhaps inside an ``OffloadWrapper``, to a total norm.

    Returns:
        The norm before clipping, fp32 ``[]``: formats with ``%.4f``. As
        `torch_moe_ep.clip_grad_norm_`: collective, the same bits on all ranks.
    """
    return _clip_grad_norm_(model, max_norm, norm_type)
