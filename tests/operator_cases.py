"""Routings and shapes that every operator test goes through, and the inputs made from them."""

from dataclasses import dataclass

import torch

import torch_moe_ep
from torch_moe_ep.ops import DispatchPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One shape and routing; `row_alignment` above 1 makes padding rows, as on CUDA."""

    name: str
    tokens: int = 7
    top_k: int = 2
    num_experts: int = 4
    hidden: int = 16
    width: int = 8
    routing: str = "random"
    row_alignment: int = 1

    def __str__(self) -> str:
        """The name, for pytest ids."""
        return self.name

    def expert_ids(self) -> torch.Tensor:
        """Expert ids int64 [T, K], distinct within a token."""
        generator = torch.Generator().manual_seed(self.tokens * 31 + self.num_experts)
        if self.routing == "one_expert":
            assert self.top_k == 1
            return torch.full((self.tokens, 1), self.num_experts - 1)
        scores = torch.rand(self.tokens, self.num_experts, generator=generator)
        return scores.argsort(dim=1)[:, : self.top_k].contiguous()

    def weights(self) -> torch.Tensor:
        """Router weights fp32 [T, K] that bf16 and fp16 hold exactly."""
        generator = torch.Generator().manual_seed(7)
        shape = (self.tokens, self.top_k)
        return torch.randint(1, 8, shape, generator=generator).float() / 8

    def tokens_of(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Hidden states [T, H] of small integers: sums of them are exact in every dtype."""
        generator = torch.Generator().manual_seed(3)
        shape = (self.tokens, self.hidden)
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    def plan(self) -> DispatchPlan:
        """The dispatch plan of one process."""
        return torch_moe_ep.ops.plan(
            self.expert_ids(), self.num_experts, row_alignment=self.row_alignment
        )

    def expert_weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [E, 2I, H] and down [E, H, I]."""
        generator = torch.Generator().manual_seed(11)
        gate_up = torch.randn(self.num_experts, 2 * self.width, self.hidden, generator=generator)
        down = torch.randn(self.num_experts, self.hidden, self.width, generator=generator)
        return (gate_up / self.hidden**0.5).to(dtype), (down / self.width**0.5).to(dtype)


CASES = (
    Case("usual"),
    Case("empty", tokens=0),
    Case("one_token", tokens=1),
    Case("one_expert_in_all", num_experts=1, top_k=1),
    Case("all_to_one_expert", top_k=1, routing="one_expert"),
    Case("k_equals_e", top_k=4),
    Case("odd_hidden", hidden=13, width=5),
    Case("many_experts", tokens=40, num_experts=16, top_k=3),
    Case("padded", tokens=9, row_alignment=8),
    Case("padded_empty", tokens=0, row_alignment=8),
)


def occupied_rows(plan: DispatchPlan) -> int:
    """Rows that belong to an expert's segment, padding included."""
    return int(plan.expert_offsets[-1])


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a non-contiguous tensor."""
    wide = torch.stack((tensor, torch.full_like(tensor, 99)), dim=-1)
    view = wide[..., 0]
    assert tensor.numel() <= 1 or not view.is_contiguous()
    return view
