"""A reentrant checkpoint that routes differently when it computes again raises.

Reentrant checkpointing runs a block without gradients, and in backward again with them. torch
compares nothing there, and takes no contexts that could keep the routing. So each experts module
notes a fingerprint of the expert ids in the first run and looks for it in the second.
"""

from collections import deque
from typing import Any

import torch
from torch import nn

# First runs that wait for their second one: micro-batches in flight, and runs without gradients
# in training mode that never get one. The oldest are forgotten.
MAX_WAITING = 1024


def watch_routing(name: str, experts: nn.Module) -> None:
    """Compare the routing of one experts module's reentrant recomputations. Local.

    Costs a hash of the ids ``[T, K]`` in either run and, in the second one, a host sync.
    """
    experts.register_forward_pre_hook(_Watch(name), with_kwargs=True)


def fingerprint(expert_ids: torch.Tensor) -> torch.Tensor:
    """An int64 that changes when any token's experts do: a sum of ids times odd constants."""
    ids = expert_ids.reshape(-1).to(torch.int64)
    places = torch.arange(ids.numel(), device=ids.device)
    mixed = (places * 6364136223846793005 + 1442695040888963407) ^ (places << 33)
    return ((ids + 1) * (mixed | 1)).sum()


class _Watch:
    """The forward pre-hook of one experts module, with the fingerprints that wait."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting: deque[torch.Tensor] = deque(maxlen=MAX_WAITING)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        is_backward = torch._C._current_graph_task_id() != -1
        if torch.is_grad_enabled() != is_backward or not module.training:
            return
        ids = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        if not is_backward:
            if not torch.is_inference_mode_enabled():
                self.waiting.append(fingerprint(ids))
        elif self.waiting and not _is_nonreentrant():
            self._compare(fingerprint(ids))

    def _compare(self, found: torch.Tensor) -> None:
        waiting = torch.stack(list(self.waiting)).tolist()  # host sync
        seen = int(found)
        if seen not in waiting:
            raise RuntimeError(
                f"{self.name} routed differently when activation checkpointing computed it again, "
                f"so its gradients would be of another model; make what stands before the router "
                f"deterministic, or checkpoint with use_reentrant=False and "
                f"context_fn=torch_moe_ep.memory.checkpoint_contexts()."
            )
        del self.waiting[waiting.index(seen)]


def _is_nonreentrant() -> bool:
    """Whether this recomputation is torch's non-reentrant kind: it runs under hooks of its own."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return True  # cannot tell: nothing is compared
    hooks = top(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
