"""Memory of one GPU: the moments of a step that can be its peak, and the largest of them.

A moment's parts add up to what torch.cuda.max_memory_allocated reports. Moments: the loss begins
its backward; the backward of the experts of the last layer, where most activations are left, and
of the second and the first, where most gradients are there; the reduction of their gradients;
that of the root's gradients; the optimizer's step.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch_moe_ep.plan import activations
from torch_moe_ep.plan.layout import Batch, Layout
from torch_moe_ep.plan.shape import ModelShape
from torch_moe_ep.plan.weights import Weight, local_parameters, num_parameters, weights_of


@dataclass(frozen=True)
class Memory:
    """Bytes at one moment on the rank that holds most.

    Attributes:
        moment: which.
        parameters: this rank's shards.
        gradients: this rank's shards of those that exist.
        optimizer: AdamW's two moments and its step counters.
        activations: kept for backward.
        buffers: of the backward at work.
        gathered: unsharded weights, their all-gather buffers, and unsharded gradients.
        host: pinned host memory of this rank, no part of the total.
    """

    moment: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    gathered: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.buffers + self.gathered


def memory_of(model: ModelShape, layout: Layout, batch: Batch) -> Memory:
    """The moment at which a rank needs most."""
    return max(moments(model, layout, batch), key=lambda memory: memory.total)


def moments(model: ModelShape, layout: Layout, batch: Batch) -> list[Memory]:
    """Every moment that can be the peak."""
    parts = _Parts(model, layout, batch)
    last = model.layers - 1
    found = [parts.loss(), parts.experts_first(last)]
    for layer in sorted({last, min(1, last), 0}, reverse=True):
        found += [parts.experts(layer)]
        if layout.has_fsdp:
            found += [parts.reduction(layer)]
    return [*found, parts.root_reduction(), parts.step()]


def state_bytes(model: ModelShape, layout: Layout) -> tuple[int, int, int]:
    """Bytes of the first rank's parameters, gradients and optimizer state, wherever they are.

    The optimizer's includes AdamW's step counter, an fp32 number for each parameter.
    """
    weights = weights_of(model)
    local = local_parameters(weights, layout.world, layout.ep, layout.shard)
    precision, counters = layout.precision, 4 * sum(weight.num for weight in weights)
    return (
        local * precision.parameter,
        local * precision.gradient,
        local * precision.optimizer + counters,
    )


def layer_experts(weights: Iterable[Weight], layers: int, ep: int) -> int:
    """Parameters of the experts of one layer that an EP rank computes with."""
    return num_parameters(weights, "expert") // layers // ep


class _Parts:
    """What the moments are made of."""

    def __init__(self, model: ModelShape, layout: Layout, batch: Batch) -> None:
        self.model, self.layout, self.batch = model, layout, batch
        weights = weights_of(model)
        size = layout.precision.compute
        self.root = size * num_parameters(weights, "root")
        self.dense = size * num_parameters(weights, "layer") // model.layers
        self.head_weights = model.vocab * model.hidden
        self.experts_bytes = size * layer_experts(weights, model.layers, layout.ep)
        self.kept = activations.kept_by_layer(model, layout, batch)
        self.states = state_bytes(model, layout)
        grid = layout.world, layout.ep, layout.shard
        of_kind = {k: local_parameters(weights, *grid, k) for k in ("root", "layer", "expert")}
        self.root_grad = layout.precision.gradient * of_kind["root"]
        layer = (of_kind["layer"] + of_kind["expert"]) // model.layers
        self.layer_grad = layout.precision.gradient * layer

    def loss(self) -> Memory:
        """The backward of the loss begins; the last layer's gather buffer is still there."""
        head = activations.kept_by_head(self.model, self.layout, self.batch)
        kept = self.kept_below(self.model.layers) + head
        buffers = activations.loss_buffers(self.model, self.batch)
        gathered = self.root + (self.experts_bytes if self.layout.shard > 1 else 0)
        return self.moment("loss", 0, kept, buffers, gathered if self.layout.has_fsdp else 0)

    def experts_first(self, layer: int) -> Memory:
        """The experts' backward before there are weight gradients."""
        buffers = activations.backward_buffers(self.model, self.layout, self.batch)[0]
        kept = self.kept_below(layer) + self.at_work(layer)
        return self.moment(
            f"activation of layer {layer}", self.done(layer), kept, buffers, self.gathered(layer)
        )

    def experts(self, layer: int) -> Memory:
        """The end of the experts' backward, their unsharded gradients beside them."""
        buffers = activations.backward_buffers(self.model, self.layout, self.batch)[1]
        kept = self.kept_below(layer) + self.at_work(layer)
        gradients, gathered = self.done(layer), self.gathered(layer) + self.experts_bytes
        if not self.layout.has_fsdp:
            gradients, gathered = gradients + self.experts_bytes, 0
        return self.moment(f"experts of layer {layer}", gradients, kept, buffers, gathered)

    def reduction(self, layer: int) -> Memory:
        """The experts' gradients in the dtype of the reduction, beside what they are made of.

        First the unsharded gradients are copied, then they are gone and the shard comes out.
        """
        products = activations.kept_by_experts(self.model, self.layout, self.batch)
        kept = self.kept_below(layer) + self.at_work(layer) - products
        precision, shard = self.layout.precision, self.layout.shard
        copy = self.experts_bytes * precision.reduce // precision.compute
        weights = self.gathered(layer) - self.experts_bytes  # this layer's are freed
        gathered = weights + copy + max(self.experts_bytes, copy // shard)
        buffers = 2 * activations.block_input(self.model, self.layout, self.batch)
        name = f"reduction of layer {layer}"
        return self.moment(name, self.done(layer), kept, buffers, gathered)

    def root_reduction(self) -> Memory:
        """The gradients of embedding and head are reduced, last of all."""
        gathered = 0
        if self.layout.has_fsdp:
            precision = self.layout.precision
            gathered = self.root + self.root * precision.reduce // precision.compute
        gradients = self.states[1] - (self.root_grad if self.layout.has_fsdp else 0)
        return self.moment("reduction of the root", gradients, 0, 0, gathered)

    def step(self) -> Memory:
        """The optimizer's step, of the fused kind, which needs nothing beside its states."""
        return self.moment("optimizer step", self.states[1], 0, 0, 0)

    def done(self, layer: int) -> int:
        """Gradients of the layers behind; without FSDP those of the head as well."""
        precision = self.layout.precision
        above = self.layer_grad * (self.model.layers - 1 - layer)
        return above if self.layout.has_fsdp else above + self.head_weights * precision.gradient

    def gathered(self, layer: int) -> int:
        """Weights while experts compute: the root's with the head's gradient, and of two layers.

        With S > 1 the experts of the layer before lie in the buffer of their all-gather.
        """
        if not self.layout.has_fsdp:
            return 0
        buffers = 1 if self.layout.shard > 1 and layer > 0 else 0
        head_gradient = self.layout.precision.compute * self.head_weights
        return self.root + head_gradient + 2 * self.dense + (1 + buffers) * self.experts_bytes

    def kept_by_each(self) -> int:
        """Activations of a layer whose backward is not at work, wherever they are."""
        if self.layout.checkpointing == "none":
            return self.kept
        inputs = activations.block_input(self.model, self.layout, self.batch)
        if self.layout.checkpointing == "rows":
            return inputs + activations.kept_rows(self.model, self.layout, self.batch)
        return inputs

    def kept_below(self, layer: int) -> int:
        """Activations on the GPU of the layers before this one.

        Offloaded: one of them, which is copied while this one computes.
        """
        is_offloaded = self.layout.offload == "activations"
        return self.kept_by_each() * (min(layer, 1) if is_offloaded else layer)

    def at_work(self, layer: int) -> int:
        """Activations of the layer whose backward runs, its input among them."""
        if self.layout.checkpointing == "none":
            return self.kept
        return self.kept + activations.block_input(self.model, self.layout, self.batch)

    def moment(self, name: str, gradients: int, kept: int, buffers: int, gathered: int) -> Memory:
        """A moment; parameters, gradients and optimizer may be on the host."""
        parameters, all_gradients, optimizer = self.states
        if self.layout.offload == "parameters":
            host = parameters + all_gradients + optimizer
            return Memory(name, 0, 0, 0, kept, buffers, gathered, host)
        host = 0
        if self.layout.offload == "activations":
            host = self.kept_by_each() * self.model.layers
        return Memory(name, parameters, gradients, optimizer, kept, buffers, gathered, host)
