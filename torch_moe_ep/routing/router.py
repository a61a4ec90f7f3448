"""The router of a patched model: Hugging Face's own forward, then what the config asks for.

The router object and its call stay, so the hooks of transformers that record router logits for
its own auxiliary loss fire as before and find the logits where they were.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_moe_ep.config import MoEConfig
from torch_moe_ep.routing.capacity import limit_copies
from torch_moe_ep.routing.choose import (
    Choice,
    choose_balanced,
    choose_biased,
    choose_sinkhorn,
    choose_top_k,
    count_copies,
)
from torch_moe_ep.routing.losses import AddGradient, load_balancing_loss, z_loss

_classes: dict[type[nn.Module], type[nn.Module]] = {}


class _Tally(NamedTuple):
    """What one forward has to report, if it is run backward."""

    z_loss: torch.Tensor
    aux_loss: torch.Tensor
    num_dropped: torch.Tensor
    copies_per_expert: torch.Tensor


class RoutedRouter(nn.Module):
    """Mixin for a Hugging Face router class; `swap_router` makes the subclass.

    Attributes:
        expert_bias_steps: int64 ``[E]`` buffer of routing="bias": the bias in units of
            `bias_update_rate`. Whole numbers, so no cast to a short type can lose an update.
            Checkpoints keep it; `export_hf` leaves it out.
        loss_sums: fp64 ``[5]``: z loss and load-balancing loss, with their coefficients, dropped
            copies, copies and backward passes since the last reset. Read by `metrics`.
        copies_per_expert: int64 ``[E]``: this rank's copies since the bias was last moved.
    The last two are plain tensors: they enter no state dict.
    """

    unexported_buffers = ("expert_bias_steps",)
    expert_bias_steps: torch.Tensor
    loss_sums: torch.Tensor
    copies_per_expert: torch.Tensor

    def setup_routing(self, config: MoEConfig, num_experts: int, device: torch.device) -> None:
        """Give the router what the class met does not have; tensors are made on `device`."""
        self.moe_config = config
        self.num_global_experts = num_experts
        self.loss_sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.copies_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
        if config.routing == "bias":
            steps = torch.zeros(num_experts, dtype=torch.int64, device=device)
            self.register_buffer("expert_bias_steps", steps)

    # Autograd functions with side effects are nothing for a compiler to trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Route ``[..., H]``: logits ``[T, E]``, weights fp32 ``[T, K]``, ids int64 ``[T, K]``.

        Collective over all ranks with aux_scope="global" in training, else local. No host sync.
        """
        with self._in_router_dtype():
            router_dtype = self.moe_config.router_dtype
            x = hidden_states if router_dtype is None else hidden_states.float()
            logits, weights, expert_ids = super().forward(x)
            if self.moe_config.routing != "huggingface":
                weights, expert_ids = self._choose(logits)
        wanted_ids, is_dropped = expert_ids, None
        if self.training and self.moe_config.capacity_factor > 0:
            weights, expert_ids, is_dropped = limit_copies(
                weights, expert_ids, self.num_global_experts, self.moe_config.capacity_factor
            )
        if self.training and weights.requires_grad:
            weights = self._add_losses(logits, weights, wanted_ids, is_dropped)
        return logits, weights, expert_ids

    def _choose(self, logits: torch.Tensor) -> Choice:
        routing, top_k = self.moe_config.routing, int(self.top_k)  # type: ignore[arg-type]
        if routing == "sinkhorn":
            return choose_sinkhorn(logits, top_k, is_training=self.training)
        if routing == "balanced":
            return choose_balanced(logits, top_k)
        if routing == "bias":
            bias = self.expert_bias_steps.to(logits.device) * self.moe_config.bias_update_rate
            return choose_biased(logits, top_k, bias.float())
        assert routing in ("none", "aux_loss")
        return choose_top_k(logits, top_k)

    def _add_losses(
        self,
        logits: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        is_dropped: torch.Tensor | None,
    ) -> torch.Tensor:
        config = self.moe_config
        z = aux = torch.zeros((), device=logits.device)
        if config.z_loss_coeff > 0:
            z = config.z_loss_coeff * z_loss(logits)
        if config.routing == "aux_loss":
            aux = config.aux_loss_coeff * load_balancing_loss(
                logits, expert_ids, is_global=config.aux_scope == "global"
            )
        tally = _Tally(
            z_loss=z.detach(),
            aux_loss=aux.detach(),
            num_dropped=z.new_zeros(()) if is_dropped is None else is_dropped.sum(),
            copies_per_expert=count_copies(expert_ids, self.num_global_experts),
        )
        apply: Any = AddGradient.apply
        identical: torch.Tensor = apply(weights, z + aux, self._counter(tally))
        return identical

    def _counter(self, tally: _Tally) -> Callable[[], None]:
        def count() -> None:
            copies = tally.copies_per_expert
            one = torch.ones((), device=copies.device)
            values = [tally.z_loss, tally.aux_loss, tally.num_dropped, copies.sum(), one]
            self.loss_sums += torch.stack([value.double() for value in values])
            self.copies_per_expert += copies

        return count

    @contextlib.contextmanager
    def _in_router_dtype(self) -> Iterator[None]:
        """Let the class met see its weight in fp32, where router_dtype="float32"."""
        weight: torch.Tensor = self.weight  # type: ignore[assignment]
        if self.moe_config.router_dtype is None:
            yield
            return
        own = self.__dict__.get("weight")  # FSDP1 may keep its view here
        self.__dict__["weight"] = weight.float()  # found before the module's parameters are
        try:
            with torch.autocast(weight.device.type, enabled=False):
                yield
        finally:
            del self.__dict__["weight"]
            if own is not None:
                self.__dict__["weight"] = own

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keep the bias when `to_empty` makes every tensor anew."""
        steps = self._buffers.get("expert_bias_steps")
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self._buffers.get("expert_bias_steps")
        if steps is not None and moved is not None and not (steps.is_meta or moved.is_meta):
            moved.copy_(steps)
        return result


def swap_router(
    router: nn.Module, config: MoEConfig, num_experts: int, device: torch.device
) -> RoutedRouter:
    """Turn a router into its routed subclass, in place: isinstance, names and hooks stay."""
    base = type(router)
    if base not in _classes:
        fields: dict[str, Any] = {"__doc__": base.__doc__, "__module__": base.__module__}
        _classes[base] = type(f"Routed{base.__name__}", (RoutedRouter, base), fields)
    router.__class__ = _classes[base]
    assert isinstance(router, RoutedRouter)
    router.setup_routing(config, num_experts, device)
    return router
