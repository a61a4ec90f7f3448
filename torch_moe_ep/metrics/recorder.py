"""A record of the experts for every step, without a wait of the host.

What layers and routers count stays on the device. `Recorder.step` takes the difference to its last
call, adds it up over all ranks and starts a copy to the host; the record is written when a later
call finds the copy done. On a GPU that is a step or two late, on a CPU at once.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from torch_moe_ep.metrics.counters import NO_EXPERTS, imbalance_of, traffic
from torch_moe_ep.metrics.entropy import watch_entropy
from torch_moe_ep.parallel.agreement import meet
from torch_moe_ep.parallel.state import ExpertParallelState, states_of

Record = dict[str, Any]
Writer = Callable[[Mapping[str, Any]], None]


class _Layer(NamedTuple):
    """What one layer counts, on its device; None where nothing does."""

    name: str
    tokens: torch.Tensor
    entropy: torch.Tensor | None
    losses: torch.Tensor | None


class _Arriving(NamedTuple):
    """A record whose numbers are on their way to the host."""

    step: int
    numbers: torch.Tensor
    event: Any
    traffic: list[Record]


class Recorder:
    """Records load, imbalance, entropy, losses, dropped copies and traffic of the steps.

    Args:
        model: a patched model, or its FSDP1 or DDP wrapper. Make the recorder after
            `load_checkpoint`: what has been counted before is left out.
        writers: called with each record on rank 0, such as `JsonLines` and `TensorBoard`.
        every: record every so many steps; a record is then the sum over these steps.

    A record is a dict: ``step``; ``imbalance``, the worst of the layers; ``layers``, name to dict;
    ``traffic``, the rows of `traffic` of this rank as dicts, empty without process-group hooks. A
    layer has ``tokens``, copies per expert over all ranks; ``imbalance``, max / mean of them;
    ``entropy`` in nats, the mean over tokens, where the router is a linear one; and, where the
    router is torch_moe_ep's own, ``z_loss``, ``aux_loss``, ``dropped`` and ``dropped_share`` (see
    `RouterLosses`).

    Attributes:
        last: the newest record on the host, on every rank; None before the first.

    Raises:
        ValueError: no expert-parallel experts in the model.
        RuntimeError: a rank did not come within the time-out; the message names it. Every rank
            makes a recorder, as each `step` adds up what all of them counted.

    Collective over all ranks, on the host alone.
    """

    def __init__(self, model: nn.Module, *writers: Writer, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}.")
        self._states = states_of(model)
        self._layers = _layers_of(self._states)
        if not self._layers:
            raise ValueError(NO_EXPERTS)
        meet("Recorder")
        self._writers: Sequence[Writer] = writers
        self._every = every
        self._is_writing = not dist.is_initialized() or dist.get_rank() == 0
        self._before = self._counted()
        self._num_resets_before = self._num_resets()
        self._traffic_before = _traffic_rows()
        self._arriving: deque[_Arriving] = deque()
        self.last: Record | None = None

    def step(self, step: int) -> None:
        """Record a step that has been run backward; write the records that have arrived.

        Args:
            step: its number; recorded if `every` divides step + 1.

        Collective over all ranks when it records (one all-reduce of layers * (E + 7) fp64). No
        host sync on CUDA.
        """
        if (step + 1) % self._every == 0:
            self._record(step)
        self._write_arrived()

    def flush(self) -> Record | None:
        """Wait for everything recorded, write it and return the newest record. Syncs the host."""
        for arriving in self._arriving:
            if arriving.event is not None:
                arriving.event.synchronize()
        self._write_arrived()
        return self.last

    def _record(self, step: int) -> None:
        counted, num_resets = self._counted(), self._num_resets()
        for kind, number in num_resets.items():
            if number != self._num_resets_before[kind]:
                self._before[kind].zero_()  # set to zero since: what counters hold came after
        numbers = torch.cat([counted[kind] - self._before[kind] for kind in counted])
        self._before, self._num_resets_before = counted, num_resets
        if dist.is_initialized():
            dist.all_reduce(numbers)
        rows = _traffic_rows()
        difference = _traffic_difference(rows, self._traffic_before)
        self._traffic_before = rows
        self._arriving.append(_Arriving(step, *_to_host(numbers), difference))

    def _write_arrived(self) -> None:
        while self._arriving and _has_arrived(self._arriving[0].event):
            self.last = self._make(self._arriving.popleft())
            for writer in self._writers if self._is_writing else ():
                writer(self.last)

    def _counted(self) -> dict[str, torch.Tensor]:
        """Everything that is counted, layer by layer: fp64, a copy."""
        tokens = torch.cat([layer.tokens for layer in self._layers]).double()
        losses = [layer.losses for layer in self._layers if layer.losses is not None]
        entropies = [layer.entropy for layer in self._layers if layer.entropy is not None]
        return {
            "experts": tokens,
            "routers": torch.cat(losses) if losses else tokens.new_zeros(0),
            "entropy": torch.cat(entropies) if entropies else tokens.new_zeros(0),
        }

    def _num_resets(self) -> dict[str, int]:
        kinds = ("experts", "routers")
        return {kind: sum(state.num_resets[kind] for state in self._states) for kind in kinds}

    def _make(self, arrived: _Arriving) -> Record:
        numbers = iter(arrived.numbers.tolist())  # on the host already
        layers: dict[str, Record] = {}
        for layer in self._layers:
            layers[layer.name] = _load(list(islice(numbers, layer.tokens.numel())))
        for layer in self._layers:
            if layer.losses is not None:
                layers[layer.name].update(_losses(*islice(numbers, 5)))
        for layer in self._layers:
            if layer.entropy is not None:
                total, tokens = islice(numbers, 2)
                layers[layer.name]["entropy"] = total / max(1.0, tokens)
        return {
            "step": arrived.step,
            "imbalance": max(layer["imbalance"] for layer in layers.values()),
            "layers": layers,
            "traffic": arrived.traffic,
        }


def _layers_of(states: Sequence[ExpertParallelState]) -> list[_Layer]:
    layers = []
    for state in states:
        for name, experts in state.experts.items():
            router = state.linear_routers.get(name)
            sums = None if router is None else watch_entropy(router, state.device)
            losses = getattr(router, "loss_sums", None)
            layers.append(_Layer(name, experts.tokens_per_expert, sums, losses))
    return layers


def _load(tokens: list[float]) -> Record:
    return {"tokens": [int(count) for count in tokens], "imbalance": imbalance_of(tokens)}


def _losses(z: float, aux: float, dropped: float, copies: float, passes: float) -> Record:
    return {
        "z_loss": z / max(1.0, passes),
        "aux_loss": aux / max(1.0, passes),
        "dropped": int(dropped),
        "dropped_share": dropped / max(1.0, copies),
    }


def _to_host(numbers: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Start a copy to pinned memory; the event says when it is there, None that it is."""
    if numbers.device.type == "cpu":
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    event = torch.get_device_module(numbers.device.type).Event()
    event.record()
    return host, event


def _has_arrived(event: Any) -> bool:
    return event is None or bool(event.query())


def _traffic_rows() -> dict[tuple[str, str], Record]:
    return {(row.group, row.stage): row._asdict() for row in traffic()}


def _traffic_difference(
    rows: dict[tuple[str, str], Record], before: dict[tuple[str, str], Record]
) -> list[Record]:
    difference = []
    for key, row in rows.items():
        old = before.get(key)
        if old is not None and old["calls"] <= row["calls"]:  # else reset since
            row = {name: v if isinstance(v, str) else v - old[name] for name, v in row.items()}  # noqa: PLW2901
        if row["calls"] > 0 or row["timed_calls"] > 0:
            difference.append(row)
    return difference
