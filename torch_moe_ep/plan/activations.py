"""Bytes that a decoder layer keeps for backward, and that its backward needs on top.

Counted from transformers' eager modules with sdpa attention and this package's experts, tensor by
tensor; b is the size of an element in the computation. A norm keeps its input in fp32, what it
divided, and its product with the weight: 4 + 2 b bytes an element. R rows of copies reach a rank's
experts: T K on average over uniform routing, and padding.
"""

from torch_moe_ep.plan.layout import Batch, Layout
from torch_moe_ep.plan.shape import ModelShape


def rows_of(model: ModelShape, layout: Layout, batch: Batch) -> int:
    """R, rows of a layer's copies on a rank.

    P = 1 allocates the most that padding can need, since the host does not know the counts; else
    half of an alignment for each local expert on average.

    >>> from torch_moe_ep.plan.layout import PRECISIONS
    >>> from torch_moe_ep.plan.shape import KNOWN
    >>> mixtral, batch = KNOWN["mistralai/mixtral-8x7b-v0.1"], Batch(4096, 1)
    >>> rows_of(mixtral, Layout(1, 1, 1, 1, PRECISIONS["bf16"]), batch)  # 8192 + 8 * 127, cut
    9088
    >>> rows_of(mixtral, Layout(4, 1, 1, 1, PRECISIONS["bf16"]), batch)  # 8192 + 2 * 64
    8320
    """
    copies, alignment = batch.tokens * model.top_k, layout.row_alignment
    if layout.ep == 1:
        return (copies + model.experts * (alignment - 1)) // alignment * alignment
    return copies + model.experts // layout.ep * (alignment // 2)


def block_input(model: ModelShape, layout: Layout, batch: Batch) -> int:
    """Bytes of a layer's input, all that full checkpointing keeps of it."""
    return layout.precision.compute * model.hidden * batch.tokens


def kept_by_norm(elements: int, compute: int) -> int:
    """Bytes that a norm over `elements` keeps."""
    return (4 + 2 * compute) * elements


def kept_by_layer(model: ModelShape, layout: Layout, batch: Batch) -> int:
    """Bytes that a layer keeps for backward without checkpointing."""
    size, tokens = layout.precision.compute, batch.tokens
    attention = 2 * size * (model.query_width + model.key_width) + 4 * model.heads
    if model.qk_norm:
        attention += (4 + size) * (model.query_width + model.key_width)
    router = 4 * model.experts + 20 * model.top_k + 8
    shared = size * (4 * model.shared_width + model.hidden) if model.shared_width else 0
    norms = 2 * kept_by_norm(model.hidden, size)
    return tokens * (norms + attention + router + shared) + kept_by_experts(model, layout, batch)


def kept_by_experts(model: ModelShape, layout: Layout, batch: Batch) -> int:
    """Bytes of the gate and up products [R, 2I], and with P > 1 of the rows [R, H]; the plan."""
    rows = rows_of(model, layout, batch)
    received = layout.precision.compute * model.hidden + 8 if layout.ep > 1 else 0
    products = layout.precision.compute * 2 * model.expert_width
    return rows * (products + received + 4) + 8 * batch.tokens * model.top_k


def kept_rows(model: ModelShape, layout: Layout, batch: Batch) -> int:
    """Bytes that checkpointing with "rows" keeps beside the layer's input."""
    rows = rows_of(model, layout, batch)
    received = rows * (layout.precision.compute * model.hidden + 12)
    return received + block_input(model, layout, batch) + 20 * batch.tokens * model.top_k


def backward_buffers(model: ModelShape, layout: Layout, batch: Batch) -> tuple[int, int]:
    """Bytes of the experts' backward beside what was kept: without and with weight gradients.

    First the gradients of the experts' output and of the activation, the activation again and the
    gradient of the products; then the activation's gradient is gone, the rows' is there, and so
    are the weights' (not counted here). At P = 1 the rows are dispatched again.
    """
    size, hidden, width = layout.precision.compute, model.hidden, model.expert_width
    again = 1 if layout.ep == 1 else 0
    rows = size * rows_of(model, layout, batch)
    outside = block_input(model, layout, batch)  # the gradient of the layer's output
    first = rows * ((1 + again) * hidden + 4 * width)
    second = rows * ((2 + again) * hidden + 3 * width)
    return first + outside, second + outside


def kept_by_head(model: ModelShape, layout: Layout, batch: Batch) -> int:
    """Bytes kept outside the layers: log-probabilities in fp32, the last norm, the rotation."""
    size = layout.precision.compute
    rotation = 2 * size * model.head_dim * batch.sequence
    labels = 12  # and the last norm's scale
    return batch.tokens * (kept_by_norm(model.hidden, size) + 4 * model.vocab + labels) + rotation


def loss_buffers(model: ModelShape, batch: Batch) -> int:
    """Bytes of two fp32 gradients of the logits, while the loss's backward runs."""
    return 8 * model.vocab * batch.tokens
