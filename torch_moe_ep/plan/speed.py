"""Seconds of a step, as a range.

Work on the GPU is matrix products at the sustained dense rate, attention, and passes over memory
at the rate of a copy. The exchange of rows is not hidden. Gathers and reductions hide behind the
work: wholly at the fast end of the range, by 70 % at the slow end. The constants below were fitted
to the measured step of one H200 and its variants (benchmarks/results/2026-11-25-step.json and
2026-11-25-offload.json); whole models on four GPUs lie in the range (2026-11-28-train-4gpu.json).
What the network reaches, and what gathers alone reach, has not been measured.
"""

from dataclasses import dataclass

from torch_moe_ep.plan import activations
from torch_moe_ep.plan.gpus import Gpu
from torch_moe_ep.plan.layout import Batch, Layout
from torch_moe_ep.plan.shape import ModelShape
from torch_moe_ep.plan.traffic import Bytes, traffic_of
from torch_moe_ep.plan.weights import local_parameters, num_parameters, weights_of

ATTENTION_SHARE = 0.5  # rate of fused attention, of the dense rate
LAYER_PASSES = 400  # bytes over memory for an element of H: norms, residuals, rotation; both ways
LOSS_PASSES = 40  # bytes over memory for a logit, both ways
LAUNCHES = 2e-3  # seconds that the host needs for a layer's kernels, both ways
ROWS_SHARE = 0.5  # of a link's rate that rows reach (2026-11-28-transport-4gpu.json)
LINK_SHARE = 0.8  # of a link's rate that gathers and reductions reach
HOST_COPY = 100e9  # bytes/s over a node's host memory, for the optimizer on the host
FAST, SLOW = 0.95, 1.12  # of the work's estimate
EXCHANGE_SLOW = 1.3  # uneven routing: the rank with most rows is waited for
NOT_HIDDEN = 0.3  # of gathers and reductions, at the slow end


@dataclass(frozen=True)
class Speed:
    """How fast a step is.

    Attributes:
        low: tokens/s of all GPUs at the slow end.
        high: at the fast end.
        work: seconds of forward, backward and recomputation on the GPU.
        exchange: seconds that rows travel.
        gather: seconds that weights and gradients travel.
        optimizer: seconds of the optimizer's step.
    """

    low: float
    high: float
    work: float
    exchange: float
    gather: float
    optimizer: float


def speed_of(model: ModelShape, layout: Layout, batch: Batch, gpu: Gpu) -> Speed:
    """The range for a layout."""
    traffic = traffic_of(model, layout, batch)
    work = max(work_seconds(model, layout, batch, gpu), moved_seconds(model, layout, batch, gpu))
    exchange = link_seconds(traffic.rows, gpu) / ROWS_SHARE
    gather = link_seconds(traffic.weights, gpu) / LINK_SHARE + shard_seconds(model, layout, gpu)
    optimizer = optimizer_seconds(model, layout, gpu)
    fast = FAST * work + exchange + max(0.0, gather - FAST * work) + optimizer
    slow = SLOW * work + EXCHANGE_SLOW * exchange + optimizer
    slow += max(0.0, gather - work) + NOT_HIDDEN * min(gather, work)
    tokens = layout.world * batch.tokens
    return Speed(tokens / slow, tokens / fast, work, exchange, gather, optimizer)


def work_seconds(model: ModelShape, layout: Layout, batch: Batch, gpu: Gpu) -> float:
    """Seconds of a step on the GPU alone; a checkpointed layer's forward counts twice."""
    forward = layer_seconds(model, layout, batch, gpu)
    passes = 4 if layout.checkpointing != "none" else 3
    layers = model.layers * max(passes * forward, LAUNCHES * passes / 3)
    logits = batch.tokens * model.vocab
    head = 6 * logits * model.hidden / gpu.matmul + logits * LOSS_PASSES / gpu.copy
    return layers + head


def layer_seconds(model: ModelShape, layout: Layout, batch: Batch, gpu: Gpu) -> float:
    """A third of the seconds of a layer's forward and backward."""
    tokens, hidden = batch.tokens, model.hidden
    dense = num_parameters(weights_of(model), "layer") // model.layers
    scores = 2 * batch.sequence * model.query_width * 3.5 / 3  # causal; backward 2.5 times forward
    flops = 2 * dense + scores / ATTENTION_SHARE
    passes = LAYER_PASSES / 3 * hidden
    seconds = tokens * (flops / gpu.matmul + passes / gpu.copy)
    return seconds + expert_seconds(model, layout, batch, gpu)


def expert_seconds(model: ModelShape, layout: Layout, batch: Batch, gpu: Gpu) -> float:
    """A third of the experts' seconds: products, passes over rows, half a read of the weights."""
    copies, size = batch.tokens * model.top_k, layout.precision.compute
    hidden, width = model.hidden, model.expert_width
    rows = size * copies * (6 * hidden + 4 * width) / 3
    weights = size * 3 * hidden * width * model.experts / layout.ep / 2
    return 6 * copies * hidden * width / gpu.matmul + (rows + weights) / gpu.copy


def moved_seconds(model: ModelShape, layout: Layout, batch: Batch, gpu: Gpu) -> float:
    """Seconds that offloaded activations travel to the host and back."""
    if layout.offload != "activations":
        return 0.0
    each = activations.kept_by_layer(model, layout, batch)
    if layout.checkpointing != "none":
        each = activations.block_input(model, layout, batch)
    if layout.checkpointing == "rows":
        each += activations.kept_rows(model, layout, batch)
    return 2 * each * model.layers / gpu.host


def shard_seconds(model: ModelShape, layout: Layout, gpu: Gpu) -> float:
    """Seconds that parameters come from the host, twice, and gradients go there."""
    if layout.offload != "parameters":
        return 0.0
    precision = layout.precision
    return local(model, layout) * (2 * precision.parameter + precision.gradient) / gpu.host


def optimizer_seconds(model: ModelShape, layout: Layout, gpu: Gpu) -> float:
    """Seconds of AdamW: all is read, parameters and moments are written."""
    precision = layout.precision
    touched = 2 * (precision.parameter + precision.optimizer) + precision.gradient
    is_on_host = layout.offload == "parameters"
    rate = HOST_COPY / layout.ranks_per_node if is_on_host else gpu.copy
    return local(model, layout) * touched / rate


def local(model: ModelShape, layout: Layout) -> int:
    """Parameters that the first rank holds."""
    return local_parameters(weights_of(model), layout.world, layout.ep, layout.shard)


def link_seconds(sent: Bytes, gpu: Gpu) -> float:
    """Seconds that bytes travel at a link's whole rate, the slower of the two links deciding."""
    return max(sent.nvlink / gpu.nvlink, sent.network / gpu.network)
