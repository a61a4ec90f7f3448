"""Memory during the step: what activation checkpointing keeps, and activations on the host.

    contexts = torch_moe_ep.memory.checkpoint_contexts("rows")
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    torch_moe_ep.memory.offload_activations(model, lambda m: isinstance(m, DecoderLayer))

File by file::

selective.py    checkpoint_contexts: recomputation neither routes nor (with "rows") sends again
fingerprint.py  reentrant checkpoints: a recomputation that routed differently raises
offload.py      offload_activations: saved tensors in host memory, loaded ahead of backward
"""

from torch_moe_ep.memory.offload import offload_activations
from torch_moe_ep.memory.selective import checkpoint_contexts

__all__ = ["checkpoint_contexts", "offload_activations"]
