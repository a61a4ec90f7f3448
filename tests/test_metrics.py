"""Expert load: copies per expert over all ranks, imbalance, reset (trap 12 has its own tests)."""

import pytest
import torch
from torch import nn

from torch_moe_ep.metrics import expert_load, reset_expert_load
from torch_moe_ep.parallel import apply_expert_parallel, init_device_mesh
from torch_moe_ep.parallel.state import iter_experts
from torch_moe_ep.testing import tiny_mixtral


def loads_on_rank(rank: int):
    """Load, imbalance, load after the reading that resets, imbalance of nothing."""
    model = apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 2))
    for layer, experts in enumerate(iter_experts(model)):
        experts.tokens_per_expert.copy_(torch.arange(8) * (1 + layer) + rank)
    load = expert_load(model, reset=True)
    rest = expert_load(model)
    reset_expert_load(model)
    return (
        {name: counts.tolist() for name, counts in load.tokens.items()},
        (load.imbalance, load.worst_imbalance),
        sum(int(counts.sum()) for counts in rest.tokens.values()),
        rest.worst_imbalance,
    )


def test_expert_load_sums_over_ranks_and_resets(ranks):
    for tokens, (imbalance, worst), rest, rest_imbalance in ranks(2).run(
        loads_on_rank, arg_of_rank=[0, 1]
    ):
        first, second = tokens
        assert first == "model.layers.0.mlp.experts"
        assert tokens[first] == [2 * i + 1 for i in range(8)]
        assert tokens[second] == [4 * i + 1 for i in range(8)]
        assert imbalance[first] == pytest.approx(15 / 8)
        assert imbalance[second] == pytest.approx(29 / 15)
        assert worst == imbalance[second]
        assert rest == 0
        assert rest_imbalance == 1.0


def test_expert_load_of_a_model_without_experts_says_what_to_call():
    with pytest.raises(ValueError, match=r"call torch_moe_ep\.apply_expert_parallel"):
        expert_load(nn.Linear(2, 2))
