"""Hugging Face folders as transformers saves them, and models to load them into."""

from pathlib import Path

import torch
from parallel_cases import Run
from torch import nn

from torch_moe_ep import apply_expert_parallel, init_device_mesh
from torch_moe_ep.testing import tiny_mixtral
from torch_moe_ep.testing.parallel import wrap

SHARD_BYTES = 200_000  # several files for the tiny Mixtral
EXPERT_NUMBERS = 2 * 8 * 3 * 64 * 128  # layers, experts, matrices, H, I


def save_hub_folder(
    folder: Path, dtype=torch.float32, *, tied=False, fused=False, single=False
) -> Path:
    """Save a tiny Mixtral: experts one by one or fused, in several files or a single one."""
    model = tiny_mixtral(seed=7, tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(
        folder,
        max_shard_size="5GB" if single else SHARD_BYTES,
        save_original_format=not fused,
    )
    return folder


def patched(run: Run, *, is_meta: bool = False, dtype=torch.float32) -> nn.Module:
    """A patched and wrapped model with weights of its own. Collective."""
    mesh = init_device_mesh("cpu", run.ep, run.shard)
    with torch.device("meta" if is_meta else "cpu"):
        model = tiny_mixtral(seed=1, **run.model).to(dtype)
    apply_expert_parallel(model, mesh)
    return wrap(model, run.wrap, mesh, **run.options)
