"""Expert load over all ranks and the recorder of steps (trap 12 has its own tests)."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter

from torch_moe_ep import MoEConfig
from torch_moe_ep.metrics import (
    JsonLines,
    Recorder,
    TensorBoard,
    expert_load,
    reset_expert_load,
    router_losses,
)
from torch_moe_ep.metrics import recorder as recorder_module
from torch_moe_ep.metrics.entropy import watch_entropy
from torch_moe_ep.parallel import apply_expert_parallel, init_device_mesh
from torch_moe_ep.parallel.state import iter_experts
from torch_moe_ep.testing import batch_of, tiny_mixtral


def loads_on_rank(rank: int):
    """Load, imbalance, load after the reading that resets, imbalance of nothing."""
    model = apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 2))
    for layer, experts in enumerate(iter_experts(model)):
        experts.tokens_per_expert.copy_(torch.arange(8) * (1 + layer) + rank)
    load = expert_load(model, reset=True)
    rest = expert_load(model)
    reset_expert_load(model)
    return (
        {name: counts.tolist() for name, counts in load.tokens.items()},
        (load.imbalance, load.worst_imbalance),
        sum(int(counts.sum()) for counts in rest.tokens.values()),
        rest.worst_imbalance,
    )


def test_expert_load_sums_over_ranks_and_resets(ranks):
    for tokens, (imbalance, worst), rest, rest_imbalance in ranks(2).run(
        loads_on_rank, arg_of_rank=[0, 1]
    ):
        first, second = tokens
        assert first == "model.layers.0.mlp.experts"
        assert tokens[first] == [2 * i + 1 for i in range(8)]
        assert tokens[second] == [4 * i + 1 for i in range(8)]
        assert imbalance[first] == pytest.approx(15 / 8)
        assert imbalance[second] == pytest.approx(29 / 15)
        assert worst == imbalance[second]
        assert rest == 0
        assert rest_imbalance == 1.0


def test_expert_load_of_a_model_without_experts_says_what_to_call():
    with pytest.raises(ValueError, match=r"call torch_moe_ep\.apply_expert_parallel"):
        expert_load(nn.Linear(2, 2))


def records_on_rank(folder: str, is_checkpointed: bool):
    """Four steps, recorded; an evaluation and a reset in between must not be counted."""
    model = tiny_mixtral(output_router_logits=True)
    config = MoEConfig(routing="aux_loss", capacity_factor=1.25)
    apply_expert_parallel(model, init_device_mesh("cpu", 2), config)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch_of(dist.get_rank())).loss.backward()  # before the recorder: left out
    logits = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _m, _a, out: logits.append(out[0]))
    board = SummaryWriter(f"{folder}/board{dist.get_rank()}")
    path = Path(folder) / f"rank{dist.get_rank()}.jsonl"
    recorder = Recorder(model, JsonLines(path), TensorBoard(board), every=2)
    entropies = []
    for step in range(4):
        logits.clear()
        model(**batch_of(dist.get_rank(), step=step)).loss.backward()
        probabilities = torch.softmax(logits[0].detach().double(), dim=-1)
        entropies.append(-(probabilities * probabilities.log()).sum(dim=-1))
        if step == 1:
            model.eval()
            model(**batch_of(dist.get_rank()))
            model.train()
        with Waits() as waits:
            recorder.step(step)
        assert waits.names == []
        if step == 1:
            assert recorder.last is not None
            reset_expert_load(model)
    losses = router_losses(model)
    sums = watch_entropy(model.model.layers[0].mlp.gate, torch.device("cpu"))
    assert sums[1] == 4 * 24  # tokens of four steps, recomputation and evaluation left out
    board.close()
    return recorder.last, torch.cat(entropies[2:]), losses.num_dropped


class Waits(TorchDispatchMode):
    """Notes the operators that make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_recorder_writes_each_second_step_and_never_waits(ranks, tmp_path, is_checkpointed):
    results = ranks(2).run(records_on_rank, str(tmp_path), is_checkpointed)
    lines = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    assert not (tmp_path / "rank1.jsonl").read_text()
    assert [line["step"] for line in lines] == [1, 3]
    record, _, dropped = results[0]
    assert results[1][0] == record == lines[1]
    name = "model.layers.0.mlp.experts"
    layer = record["layers"][name]
    for line in lines:  # two ranks, two steps, 24 tokens, two copies a token
        for counted in line["layers"].values():
            assert sum(counted["tokens"]) == 2 * 2 * 24 * 2
            assert counted["dropped"] == round(counted["dropped_share"] * 2 * 2 * 24 * 2)
    assert (
        1.0 < layer["imbalance"] == pytest.approx(max(layer["tokens"]) * 8 / sum(layer["tokens"]))
    )
    assert record["imbalance"] == max(row["imbalance"] for row in record["layers"].values())
    wanted = torch.cat([entropies for _, entropies, _ in results]).mean()
    assert layer["entropy"] == pytest.approx(float(wanted), rel=1e-6)
    router = "model.layers.0.mlp.gate"
    assert 0 < sum(line["layers"][name]["dropped"] for line in lines) < dropped[router]
    events = EventAccumulator(str(tmp_path / "board0")).Reload()
    assert [e.step for e in events.Scalars(f"Experts/entropy/{name}")] == [1, 3]
    assert events.Scalars("Experts/imbalance/worst")[1].value == pytest.approx(record["imbalance"])


def test_recorder_on_a_device_that_lags_writes_late_and_waits_at_flush_alone(ranks, monkeypatch):
    for order in ranks(2).run(lagging_on_rank):
        assert order == ["wait 0", "wait 1", "record 0", "record 1"]


def lagging_on_rank() -> list[str]:
    """The order of waits and records where copies to the host arrive at the flush only."""
    order: list[str] = []
    events = []

    class Event:
        def __init__(self) -> None:
            self.number = len(events)
            self.is_done = False
            events.append(self)

        def query(self) -> bool:
            return self.is_done

        def synchronize(self) -> None:
            order.append(f"wait {self.number}")
            self.is_done = True

    recorder_module._to_host = lambda numbers: (numbers, Event())
    try:
        model = apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 2))
        recorder = Recorder(model, lambda record: order.append(f"record {record['step']}"))
        recorder._is_writing = True
        for step in range(2):
            model(**batch_of(dist.get_rank(), step=step)).loss.backward()
            recorder.step(step)
        recorder.flush()
    finally:
        importlib.reload(recorder_module)
    return order


def traffic_on_rank() -> list[list[dict]]:
    """The traffic rows of two steps, with the counters left alone in between."""
    model = apply_expert_parallel(tiny_mixtral(), init_device_mesh("cpu", 2))
    recorder = Recorder(model)
    rows = []
    for step in range(2):
        model(**batch_of(dist.get_rank())).loss.backward()
        recorder.step(step)
        rows.append([row for row in recorder.last["traffic"] if row["stage"] != "all-reduce"])
    return rows


def test_recorder_has_bytes_and_milliseconds_of_each_stage_with_hooks(hooked_ranks):
    wanted = {"plan", "dispatch", "combine", "dispatch backward", "combine backward"}
    for rows in hooked_ranks(2).run(traffic_on_rank):
        first, second = ({row["stage"]: row for row in step} for step in rows)
        assert set(second) == wanted <= set(first)
        for stage, row in second.items():
            assert row["milliseconds"] > 0
            for key in ("calls", "bytes", "timed_calls"):
                assert row[key] == first[stage][key] > 0


def test_recorder_refuses_a_model_without_experts():
    with pytest.raises(ValueError, match=r"call torch_moe_ep\.apply_expert_parallel"):
        Recorder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        Recorder(nn.Linear(2, 2), every=0)


def test_json_lines_go_on_after_a_half_written_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n{"st')
    writer = JsonLines(path)
    writer({"step": 1})
    writer.close()
    assert path.read_text().splitlines() == ['{"step": 0}', '{"st', '{"step": 1}']
