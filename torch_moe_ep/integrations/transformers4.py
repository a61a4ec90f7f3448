"""transformers 4.57: experts one by one in a ModuleList, and a block that returns a tuple.

There the swap point is the block. Its experts become one fused module of transformers 5's shape,
layer by layer, and the block's class a subclass that routes as the class met does and then calls
that module::

    block_sparse_moe.gate             Linear, as it was
    block_sparse_moe.experts.3.w1     gate_up_proj[3, 0:I]
    block_sparse_moe.experts.3.w3     gate_up_proj[3, I:2I]
    block_sparse_moe.experts.3.w2     down_proj[3]

The hub's files have the names on the left; `hub_parts` and `HUB_EXPERT` lead from one to the other.
"""

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from torch_moe_ep.integrations.wrapper_names import plain_name


class Names(NamedTuple):
    """What a family calls the three weights of an expert."""

    gate: str
    up: str
    down: str


MIXTRAL, LLAMA = Names("w1", "w3", "w2"), Names("gate_proj", "up_proj", "down_proj")
BLOCKS = {
    "MixtralSparseMoeBlock": MIXTRAL,
    "Qwen3MoeSparseMoeBlock": LLAMA,
    "OlmoeSparseMoeBlock": LLAMA,
}
HUB_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")

_classes: dict[type[nn.Module], type[nn.Module]] = {}


class FusedExperts(nn.Module):
    """The experts of a block as transformers 5 has them; computes once it is expert-parallel."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(
        self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: Any, requires_grad: bool
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=requires_grad)
        self.down_proj = nn.Parameter(down, requires_grad=requires_grad)
        self.act_fn = act_fn


class ExpertParallelBlock(nn.Module):
    """Mixin for a block's class; `fuse_block` makes the subclass."""

    hub_names: Names

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route and compute ``[B, N, H]``; returns the same shape and the logits ``[B * N, E]``."""
        block: Any = self
        jitter = getattr(block, "jitter_noise", 0)
        if self.training and jitter > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - jitter, 1.0 + jitter)
            hidden_states *= noise
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits = block.gate(x)
        scores = F.softmax(logits, dim=1, dtype=torch.float)
        weights, expert_ids = torch.topk(scores, block.top_k, dim=-1)
        if getattr(block, "norm_topk_prob", True):
            weights = weights / weights.sum(dim=-1, keepdim=True)
        output = block.experts(x, expert_ids, weights.to(x.dtype))
        return output.view(hidden_states.shape), logits


def find_blocks(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """Find blocks of experts in a ModuleList.

    Args:
        model: any module.

    Returns:
        Name of the experts to a stand-in of the fused module (shapes, dtype and device are right,
        no memory), and one sentence for each block that cannot be fused.

    Not collective.
    """
    fits: dict[str, nn.Module] = {}
    misfits: list[str] = []
    for name, block in model.named_modules():
        if not isinstance(block._modules.get("experts"), nn.ModuleList):
            continue
        reason = _misfit(block)
        if reason is None:
            fits[f"{name}.experts"] = _stand_in(block)
        else:
            misfits.append(f"{name} ({type(block).__name__}): {reason}")
    return fits, misfits


def fuse_block(model: nn.Module, name: str) -> nn.Module:
    """Give the block of the experts at `name` its fused module, in place, and return it.

    Copies the layer's expert weights and lets the old ones go. Not collective.
    """
    block = model.get_submodule(name.removesuffix(".experts"))
    names = BLOCKS[type(block).__name__]
    experts: Any = block._modules["experts"]
    gate_up = torch.stack(
        [torch.cat([_weight(e, names.gate), _weight(e, names.up)]) for e in experts]
    )
    down = torch.stack([_weight(e, names.down) for e in experts])
    first: Any = experts[0]
    fused = FusedExperts(gate_up, down, first.act_fn, _is_trained(first, names))
    base = type(block)
    if base not in _classes:
        fields = {"__doc__": base.__doc__, "__module__": base.__module__, "hub_names": names}
        _classes[base] = type(f"ExpertParallel{base.__name__}", (ExpertParallelBlock, base), fields)
    block.experts = fused
    block.__class__ = _classes[base]
    return fused


def fused_names(model: nn.Module) -> dict[str, Names]:
    """The hub's names of each fused experts module, by the module's name without wrappers'.

    Empty for transformers 5. Not collective.
    """
    return {
        f"{plain_name(name)}.experts": block.hub_names
        for name, block in model.named_modules()
        if isinstance(block, ExpertParallelBlock)
    }


def hub_parts(name: str, tensor: torch.Tensor, fused: dict[str, Names]) -> dict[str, torch.Tensor]:
    """One weight as the hub's tensors: experts one by one, everything else as it is (views)."""
    prefix, _, attribute = name.rpartition(".")
    names = fused.get(prefix)
    if names is None or attribute not in ("gate_up_proj", "down_proj"):
        return {name: tensor}
    parts: dict[str, torch.Tensor] = {}
    for index, expert in enumerate(tensor.unbind()):
        key = f"{prefix}.{index}"
        if attribute == "down_proj":
            parts[f"{key}.{names.down}.weight"] = expert
        else:
            gate, up = expert.chunk(2)
            parts |= {f"{key}.{names.gate}.weight": gate, f"{key}.{names.up}.weight": up}
    return parts


def _misfit(block: nn.Module) -> str | None:
    names = BLOCKS.get(type(block).__name__)
    if names is None:
        known = ", ".join(sorted(BLOCKS))
        return f"of blocks with experts one by one only {known} are known; use transformers 5"
    experts: Any = block._modules["experts"]
    for expert in experts:
        layers = [getattr(expert, name, None) for name in names]
        if any(type(layer) is not nn.Linear or layer.bias is not None for layer in layers):
            return f"its experts are not {', '.join(names)} of Linear without bias alone"
    return None


def _stand_in(block: nn.Module) -> FusedExperts:
    names = BLOCKS[type(block).__name__]
    experts: Any = block._modules["experts"]
    first: Any = experts[0]
    width, hidden = _weight(first, names.gate).shape
    one = _weight(first, names.gate).new_empty(1, 1, 1)
    return FusedExperts(
        one.expand(len(experts), 2 * width, hidden),
        one.expand(len(experts), hidden, width),
        first.act_fn,
        _is_trained(first, names),
    )


def _is_trained(expert: nn.Module, names: Names) -> bool:
    return all(getattr(expert, name).weight.requires_grad for name in names)


def _weight(expert: nn.Module, name: str) -> torch.Tensor:
    weight: torch.Tensor = getattr(expert, name).weight
    return weight.detach()
