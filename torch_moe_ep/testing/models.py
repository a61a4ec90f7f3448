"""A tiny Mixtral and seeded batches."""

from typing import Any

import torch
from torch import nn


def tiny_mixtral(*, seed: int = 0, router_scale: float = 1.0, **overrides: Any) -> nn.Module:
    """A Mixtral for causal language modelling, small enough for a test on two cores.

    Hidden 64, expert width 128, 2 layers, 8 experts, top-2, vocabulary 128, fp32, eager experts
    (transformers' grouped experts refuse sizes this small).

    Args:
        seed: of the initial weights; the same on every rank gives the same model.
        router_scale: factor on the router weights; large values route unevenly.
        overrides: fields of MixtralConfig.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "use_cache": False,
        **overrides,
    }
    config = MixtralConfig(**fields)
    config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = MixtralForCausalLM(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                param.mul_(router_scale)
    return model


def batch_of(
    rank: int, *, tokens: int = 24, rows: int = 2, vocab: int = 128, step: int = 0
) -> dict[str, torch.Tensor]:
    """One rank's batch of one step: ids, and labels equal to them; differs by rank and step."""
    generator = torch.Generator().manual_seed(1000 * (step + 1) + rank)
    ids = torch.randint(0, vocab, (rows, tokens // rows), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}
