"""Gradient norms of Hugging Face Trainer where sharded experts stand beside plain gradients.

Newer Trainers take DTensors beside plain tensors (FSDP1, DDP or nothing outside) for transformers'
own expert parallelism: experts on a mesh of one dimension, the rest replicated. The experts here
are on a mesh of two, and FSDP1's gradients are shards, so that the method fails. For patched
models it is answered by `clip_grad_norm_`; others go on to Trainer's own.
"""

import sys
from typing import Any

import torch
from torch import nn

from torch_moe_ep.parallel.grad_norm import clip_grad_norm_
from torch_moe_ep.parallel.state import states_of

METHOD = "_mixed_mesh_grad_norm"


def register_trainer_clip() -> None:
    """Answer for patched models, once per process, if Trainer is imported and has the method."""
    module: Any = sys.modules.get("transformers.trainer")
    original = getattr(getattr(module, "Trainer", None), METHOD, None)
    if original is None or hasattr(original, "is_torch_moe_ep"):
        return

    def run(self: Any, model: nn.Module, max_norm: float) -> torch.Tensor:
        if states_of(model):
            return clip_grad_norm_(model, max_norm)
        norm: torch.Tensor = original(self, model, max_norm)
        return norm

    run.is_torch_moe_ep = True  # type: ignore[attr-defined]
    setattr(module.Trainer, METHOD, run)
