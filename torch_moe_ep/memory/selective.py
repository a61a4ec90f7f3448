"""A selective policy for torch.utils.checkpoint: the routing is kept, the rest is computed again.

A checkpointed block runs twice. If its second run routed one token differently, the gradients of
that token would belong to another expert than its loss. With these contexts the second run gets
the first one's routing back; with "rows" also what travelled, so that it sends nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from torch_moe_ep import ops  # noqa: F401  registers the operators

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
ROUTING = ("route", "sinkhorn", "plan", "node_plan", "peer_plan", "plan_chunks", "peer_plan_chunks")
KEPT = {
    "routing": ROUTING,
    "rows": (
        *ROUTING,
        *("dispatch", "combine", "node_dispatch", "node_combine", "peer_dispatch", "peer_combine"),
        "chunked_experts_forward",
    ),
}
# Arguments before those whose outcome must not be kept: x, for which a plan packs rows, and the
# wish of peer_dispatch to leave rows in the peers' buffer.
NUM_ARGUMENTS = {"plan": 6, "plan_chunks": 7, "peer_dispatch": 11}


def checkpoint_contexts(keep: str = "routing") -> Callable[[], Contexts]:
    """Make the ``context_fn`` of non-reentrant activation checkpointing.

    For ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=...)``, for
    torch's ``checkpoint_wrapper(..., context_fn=...)`` and for Hugging Face's
    ``gradient_checkpointing_enable({"use_reentrant": False, "context_fn": ...})``. Gradients are
    bit-equal to those without checkpointing.

    Args:
        keep: what a block keeps besides its input. "routing": every top-k, the outputs of `route`
            and of `plan` (a few int64 per copy); recomputation runs `dispatch` and `combine`
            again. "rows": the rows that `dispatch` received ``[R, H]`` and the result of
            `combine` ``[T, H]`` too; recomputation exchanges nothing.

    Returns:
        A function that gives the two contexts of one block: forward and recomputation.

    Raises:
        ValueError: another word for `keep`.

    Under reentrant checkpointing torch takes no contexts; there a recomputation that routes
    differently raises.
    """
    if keep not in KEPT:
        raise ValueError(f'keep must be "routing" or "rows", got {keep!r}.')
    kept = [getattr(torch.ops.torch_moe_ep, name).default for name in KEPT[keep]]

    def contexts() -> Contexts:
        forward, recompute = create_selective_checkpoint_contexts(kept)
        found: list[tuple[torch.Tensor, ...]] = []
        keeps_rows = keep == "rows"
        return (
            _Both(forward, _NoteTopK(found, keeps_rows)),
            _Both(recompute, _GiveTopK(found, keeps_rows)),
        )

    return contexts


class _Both(AbstractContextManager[None]):
    """Two contexts as one; the second is the inner one."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self.contexts = contexts
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self.stack = stack.pop_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return self.stack.__exit__(kind, error, trace)


def _call(func: Any, args: Any, kwargs: Any, keeps_rows: bool) -> Any:
    """Call an operator as its outputs are to be kept.

    A plan without x, so that it holds no rows to send; peer_dispatch with rows of their own.
    Chunked experts with rows in place of gate and up products, which backward then computes again
    from them, as it does with what `dispatch` kept.
    """
    for name, num_arguments in NUM_ARGUMENTS.items():
        if func is getattr(torch.ops.torch_moe_ep, name).default:
            args = args[:num_arguments]
    if keeps_rows and func is torch.ops.torch_moe_ep.chunked_experts_forward.default:
        *args, keep_rows, keep_gate_up = args
        args = (*args, keep_rows or keep_gate_up, False)
    return func(*args, **(kwargs or {}))


class _NoteTopK(TorchDispatchMode):
    """Keeps copies of what top-k found.

    torch's own contexts keep the tensors themselves, and routers divide the weights in place.
    """

    def __init__(self, found: list[tuple[torch.Tensor, ...]], keeps_rows: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self.keeps_rows = keeps_rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _call(func, args, kwargs, self.keeps_rows)
        if func is torch.ops.aten.topk.default:
            self.found.append(tuple(part.clone() for part in out))
        return out


class _GiveTopK(TorchDispatchMode):
    """Gives the copies back, in the order in which they were kept."""

    def __init__(self, found: list[tuple[torch.Tensor, ...]], keeps_rows: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self.keeps_rows = keeps_rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.topk.default and self.found:
            return self.found.pop(0)
        return _call(func, args, kwargs, self.keeps_rows)
