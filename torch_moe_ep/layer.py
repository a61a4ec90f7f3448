"""The expert-parallel experts module: plan, dispatch, expert_mlp, combine."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor

from torch_moe_ep import label, ops
from torch_moe_ep.chunks import run_in_chunks
from torch_moe_ep.config import MoEConfig
from torch_moe_ep.gather_dispatch import (
    CountCopies,
    gather_tokens,
    plan_own_experts,
    scatter_sums,
)
from torch_moe_ep.node_dispatch import run_over_nodes
from torch_moe_ep.peer_dispatch import run_over_peers
from torch_moe_ep.routing.choose import count_copies


class ExpertParallelExperts(nn.Module):
    """Mixin for a Hugging Face experts class; `torch_moe_ep.parallel.swap` makes the subclass.

    Weights keep Hugging Face's names and global shapes: ``gate_up_proj [E, 2I, H]`` and
    ``down_proj [E, H, I]``, of which this rank holds L = E / P experts.

    Attributes:
        tokens_per_expert: int64 ``[E]``, copies of this rank's tokens per global expert, counted
            once per backward. Read by `torch_moe_ep.metrics`.
        invalid_flag: int32 ``[1]``, 1 once an expert id out of range was met on CUDA. Read by
            clipping and by the optimizer's step hook.
        slots_needed: int64 ``[1]``, rows that a rank of the EP group would have needed where they
            were more than `capacity`, else 0. Read where `invalid_flag` is.
        capacity: rows of a rank with the peer transport and budget="bounded"; 0 until they are
            fixed.
        layer_name: what process-group hooks call the module.
        bytes_between_nodes: int64 ``[2]`` on the CPU, with the hierarchical transport: bytes of
            rows, and of expert ids and router weights, that this rank sent to other nodes.
        adapters: weight name to PEFT's wrappers around this module, which add LoRA to it.
        adapter_layers: the modules that hold the wrappers' factors.
    The tensors are plain tensors, not buffers: they enter no state dict and no broadcast.
    """

    tokens_per_expert: torch.Tensor
    invalid_flag: torch.Tensor
    slots_needed: torch.Tensor
    capacity: int = 0
    bytes_between_nodes: torch.Tensor
    layer_name: str = ""
    adapters: dict[str, list[Any]]
    adapter_layers: list[nn.Module]

    def setup_expert_parallel(
        self,
        *,
        ep_group_name: str,
        num_experts: int,
        weight_grad_scale: float,
        config: MoEConfig,
        device: torch.device,
        ranks_per_node: int = 0,
        uses_peers: bool = False,
    ) -> None:
        """Give the module what the class met does not have.

        Args:
            ep_group_name: name of the EP process group, whose rank r owns the experts
                [r * L, r * L + L); "" for P = 1.
            num_experts: E.
            weight_grad_scale: factor on weight gradients.
            config: what is chosen.
            device: where the experts compute.
            ranks_per_node: ranks of the EP group on a node, where tokens shall cross between
                nodes once; 0: one all-to-all, whatever the nodes.
            uses_peers: rows travel by the peer transport.
        """
        self.ep_group_name = ep_group_name
        self.num_global_experts = num_experts
        self.weight_grad_scale = weight_grad_scale
        self.moe_config = config
        self.ranks_per_node = ranks_per_node
        self.uses_peers = uses_peers
        self.bytes_between_nodes = torch.zeros(2, dtype=torch.int64)
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.invalid_flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.slots_needed = torch.zeros(1, dtype=torch.int64, device=device)
        self.adapters = {}
        self.adapter_layers = []

    def holders(self) -> list[nn.Module]:
        """The modules that hold the experts' parameters: this one, and LoRA factors of PEFT's."""
        return [self, *self.adapter_layers]

    def held_parameters(self) -> Iterator[nn.Parameter]:
        """The experts' weights and their LoRA factors."""
        for holder in self.holders():
            yield from holder.parameters(recurse=False)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run every token through its experts, wherever they are.

        Args:
            hidden_states: ``[..., H]``, T tokens of this rank; T may be 0 and differ by rank.
            top_k_index: int64 ``[T, K]``, global expert ids.
            top_k_weights: ``[T, K]``.

        Returns:
            The same shape and dtype as `hidden_states`.

        P > 1: collective over the EP group, one host sync on CUDA (see `ops.plan`; none with the
        peer transport and budget="bounded"), and a graph break under torch.compile. P = 1: no
        collective; host syncs of `ops.expert_mlp` only.
        """
        run = self._exchange if self.ep_group_name else self._run
        return run(hidden_states, top_k_index, top_k_weights)

    # The number of received rows is known at run time alone: nothing for a compiler to specialise.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _exchange(self, *args: torch.Tensor) -> torch.Tensor:
        """Run with other ranks, with this layer's name on it where process groups have hooks."""
        if not label.is_enabled():
            return self._run(*args)
        before = label.exchange(label.layer_id(self.layer_name))
        try:
            return self._run(*args)
        finally:
            label.exchange(*before)

    def _run(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        output = self._way()(hidden_states, *routing).to(hidden_states.dtype)
        # No view: an in-place operation would put a new node in the place of a view's, and FSDP2
        # gathers the weights for backward at the node that it met.
        shaped: torch.Tensor = torch.ops.aten._unsafe_view(output, hidden_states.shape)
        return shaped

    def _way(self) -> Callable[..., torch.Tensor]:
        """How rows travel, as `apply_expert_parallel` has settled it; returns ``[T, H]``."""
        if not self.ep_group_name:
            return self._pipeline
        if self.moe_config.dispatcher == "all_gather":
            return self._gathered
        if self.uses_peers and self.moe_config.received_rows == "dispatch_again":
            return partial(run_over_peers, self)
        if self.uses_peers or self.moe_config.num_chunks > 1:
            return partial(run_in_chunks, self)
        if self.ranks_per_node:
            return partial(run_over_nodes, self)
        return self._pipeline

    def _pipeline(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        config = self.moe_config
        x = self.tokens_of(hidden_states)
        weights = top_k_weights.float()
        plan, packed = ops.plan_and_pack(
            x,
            weights,
            top_k_index,
            self.num_global_experts,
            group_name=self.ep_group_name,
            max_rows=config.max_received_rows,
            invalid_flag=self.invalid_flag,
        )
        rows, row_weights = ops.dispatch(x, weights, plan, packed)
        del packed
        keeps_rows = bool(self.ep_group_name) or config.received_rows == "keep"
        y = self.expert_mlp(rows, row_weights, plan, x=None if keeps_rows else x)
        return ops.combine(y, plan, tokens_per_expert=self.tokens_per_expert)

    def _gathered(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The pipeline over all tokens of the EP group, of which this rank's experts take theirs.

        Collective over the EP group (four all-gathers, a reduce-scatter), one host sync.
        """
        group = _resolve_process_group(self.ep_group_name)  # type: ignore[arg-type]
        x = self.tokens_of(hidden_states)
        tokens, ids, weights = gather_tokens(
            x,
            top_k_index,
            top_k_weights.float(),
            self.num_global_experts,
            group,
            max_rows=self.moe_config.max_received_rows,
        )
        num_local = self.num_global_experts // group.size()
        whole, own = plan_own_experts(ids, group.rank() * num_local, num_local)
        rows, row_weights = ops.dispatch(tokens, weights, whole)
        # Slots behind the last own segment hold anything: neither they nor their gradients count.
        is_own = torch.arange(rows.shape[0], device=rows.device) < own.expert_offsets[-1]
        own_rows = torch.where(is_own.unsqueeze(1), rows, 0.0)
        y = self.expert_mlp(own_rows, torch.where(is_own, row_weights, 0.0), own)
        parts = ops.combine(torch.where(is_own.unsqueeze(1), y, 0.0), whole)
        output = scatter_sums(parts, group)[: x.shape[0]]
        count: Any = CountCopies.apply
        copies = count_copies(top_k_index, self.num_global_experts)
        counted: torch.Tensor = count(output, copies, self.tokens_per_expert)
        return counted

    def tokens_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[..., H]`` as ``[T, H]``, under autocast in its dtype: rows travel so."""
        x = hidden_states.reshape(-1, hidden_states.size(-1))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def expert_mlp(
        self,
        rows: torch.Tensor,
        row_weights: torch.Tensor,
        plan: ops.DispatchPlan | ops.NodePlan | ops.PeerPlan,
        *,
        x: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """This rank's experts over rows in their order: `ops.expert_mlp` as configured.

        Args:
            rows: ``[R, H]``.
            row_weights: fp32 ``[R]``.
            plan: of the rows, of any transport.
            x: tokens ``[T, H]`` that rows are copies of, to be kept in their place.

        Returns:
            ``[R, H]``. Local; host syncs of `ops.expert_mlp`.
        """
        return ops.expert_mlp(
            rows,
            row_weights,
            plan,
            self.local_weight("gate_up_proj", rows.dtype),
            self.local_weight("down_proj", rows.dtype),
            weight_grad_scale=self.weight_grad_scale,
            slots_per_pass=self.moe_config.max_slots,
            recompute_gate_up=self.moe_config.recompute == "gate_up",
            x=x,
        )

    def local_weight(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """This rank's experts ``[L, ...]``, in the tokens' dtype where nobody has cast them yet."""
        weight = self._parameters[name]
        assert weight is not None
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if not torch.is_autocast_enabled(local.device.type):
            local = local.to(dtype)
        for adapter in self.adapters.get(name, ()):
            local = adapter.add_to(local)
        return local
