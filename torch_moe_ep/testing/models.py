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


class LoneExperts(nn.Module):
    """A model that is one experts module of Mixtral's; routing is given by the caller."""

    def __init__(
        self, num_experts: int = 8, hidden: int = 16, width: int = 32, *, seed: int = 0
    ) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=hidden, intermediate_size=width, num_local_experts=num_experts
        )
        config._experts_implementation = "eager"
        self.experts = MixtralExperts(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for param in self.experts.parameters():
                param.normal_(0.0, param.shape[-1] ** -0.5, generator=generator)

    def forward(
        self, hidden_states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [T, H] with expert ids and weights [T, K] to [T, H]."""
        result: torch.Tensor = self.experts(hidden_states, expert_ids, weights)
        return result


def make_local_expert_parallel(experts: nn.Module, config: Any = None) -> nn.Module:
    """Swap one experts module in place for P = 1, with neither process group nor FSDP."""
    from torch_moe_ep.config import MoEConfig
    from torch_moe_ep.layer import ExpertParallelExperts
    from torch_moe_ep.parallel.swap import expert_parallel_class

    num_experts = experts.get_parameter("gate_up_proj").shape[0]
    experts.__class__ = expert_parallel_class(type(experts))
    assert isinstance(experts, ExpertParallelExperts)
    experts.setup_expert_parallel(
        ep_group_name="",
        num_experts=num_experts,
        weight_grad_scale=1.0,
        config=MoEConfig() if config is None else config,
        device=experts.get_parameter("gate_up_proj").device,
    )
    return experts


def random_routing(
    tokens: int, top_k: int, num_experts: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids int64 [T, K], distinct within a token, and fp32 weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_experts, generator=generator)
    weights, expert_ids = scores.topk(top_k, dim=-1)
    return expert_ids, weights / weights.sum(dim=-1, keepdim=True)
