"""What a checkpoint holds beside weights and optimizer, and saving in the background."""

import random
import threading
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, backward, build
from torch.distributed.checkpoint import filesystem

import torch_moe_ep
from torch_moe_ep import load_checkpoint, load_data_state, save_checkpoint, wait_for_checkpoint
from torch_moe_ep.checkpoint import save as save_module
from torch_moe_ep.checkpoint.rank_state import pack
from torch_moe_ep.metrics import expert_load
from torch_moe_ep.testing.parallel import full_parameters

RUN = Run("fsdp2", 2, 2)


def draws():
    """The next numbers of every generator on the CPU."""
    return [random.random(), float(numpy.random.rand()), torch.rand(3).tolist()]  # noqa: NPY002


def seed_all(seed: int, torch_seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(torch_seed)


def saved_draws(path: str, run: Run):
    """Python and numpy seeded alike on all ranks, torch apart; the numbers after the save."""
    seed_all(5, dist.get_rank())
    save_checkpoint(path, build(run), step=1)
    return draws()


def resumed_draws(path: str, run: Run):
    model = build(run)
    seed_all(99, 99)
    load_checkpoint(path, model)
    return draws()


def test_generators_go_on_at_the_same_number_of_ranks(ranks, tmp_path):
    saved = ranks(2).run(saved_draws, str(tmp_path / "a"), RUN)
    assert saved[0][2] != saved[1][2]
    for run in (RUN, Run("fsdp1", 2, 1)):
        assert ranks(2).run(resumed_draws, str(tmp_path / "a"), run) == saved


def test_generators_at_another_number_of_ranks_are_alike_or_apart_as_they_were(ranks, tmp_path):
    saved = ranks(2).run(saved_draws, str(tmp_path / "a"), RUN)
    resumed = ranks(4).run(resumed_draws, str(tmp_path / "a"), Run("fsdp2", 4, 2))
    assert [draw[:2] for draw in resumed] == [saved[0][:2]] * 4
    torch_draws = [tuple(draw[2]) for draw in resumed]
    assert len({*torch_draws, tuple(saved[0][2]), tuple(saved[1][2])}) == 6
    again = ranks(4).run(resumed_draws, str(tmp_path / "a"), Run("fsdp2", 4, 2))
    assert again == resumed


def save_everything(path: str):
    model = build(RUN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    backward(RUN, model)
    optimizer.step()
    scheduler.step()
    rank = dist.get_rank()
    save_checkpoint(
        path, model, optimizer, step=4, scheduler=scheduler,
        data_state={"epoch": 3, "seen": [rank, 8], "order": torch.arange(3) + rank},
    )  # fmt: skip
    save_checkpoint(f"{path}_alike", model, step=5, data_state=("epoch", 7))
    return {name: counts.tolist() for name, counts in expert_load(model).tokens.items()}


def load_everything(path: str, run: Run):
    model = build(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    assert load_checkpoint(path, model, optimizer, scheduler=scheduler) == 4
    assert scheduler.last_epoch == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert load_data_state(f"{path}_alike") == ("epoch", 7)
    if dist.get_world_size() == 2:
        state = load_data_state(path)
        assert state["seen"] == [dist.get_rank(), 8]
        assert state["order"].tolist() == [dist.get_rank() + i for i in range(3)]
    else:
        with pytest.raises(ValueError, match="pass rank=0 to rank=1 and deal them out"):
            load_data_state(path)
    assert [load_data_state(path, rank=rank)["seen"][0] for rank in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="one of the 2 that saved"):
        load_data_state(path, rank=2)
    with pytest.raises(ValueError, match="saved without an optimizer"):
        load_checkpoint(f"{path}_alike", model, optimizer)
    with pytest.raises(ValueError, match="saved without a scheduler"):
        load_checkpoint(f"{path}_alike", model, scheduler=scheduler)
    return {name: counts.tolist() for name, counts in expert_load(model).tokens.items()}


def test_scheduler_data_position_and_counters_come_back(ranks, tmp_path):
    path = str(tmp_path / "a")
    load = ranks(2).run(save_everything, path)[0]
    assert all(sum(counts) == 2 * 24 * 2 for counts in load.values())  # ranks, tokens, K
    for run in (RUN, Run("fsdp2", 1, 1), Run("fsdp1", 4, 4)):
        assert ranks(run.world).run(load_everything, path, run)[0] == load


def refuse_objects(path: str) -> None:
    model = build(RUN)
    state = {"loader": threading.Lock()} if dist.get_rank() == 1 else None
    with pytest.raises(ValueError, match=r"rank 1: data_state cannot be saved .*lock.* may hold"):
        save_checkpoint(path, model, data_state=state)
    assert not Path(path).exists()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        load_checkpoint(path, model)


def test_data_state_of_other_objects_is_refused_on_every_rank(ranks, tmp_path):
    ranks(2).run(refuse_objects, str(tmp_path / "a"))


def test_object_that_cannot_be_loaded_safely_is_named_by_its_class():
    with pytest.raises(
        ValueError, match=r"data_state cannot be saved \(it holds a pathlib\S+\); it"
    ):
        pack({"folder": Path("data")}, "data_state")


class Gate:
    """Holds every write of torch.distributed.checkpoint back until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.events: list[str] = []
        write = filesystem._write_item

        def slow(*args, **kwargs):
            assert self.opened.wait(60)
            self.events.append("write")
            return write(*args, **kwargs)

        patch.setattr(filesystem, "_write_item", slow)


def train_through_a_save(folder: str, run: Run) -> None:
    """Two steps while the writes wait; what is written is the state at the call."""
    model = build(run)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(run, model)
    optimizer.step()
    before = full_parameters(model)
    path = Path(folder) / "one"
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        save_checkpoint(path, model, optimizer, step=1, async_save=True)
        for step in (1, 2):
            optimizer.zero_grad()
            backward(run, model, step)
            optimizer.step()
        assert torch_moe_ep.latest_checkpoint(folder) is None
        assert not path.exists() and gate.events == []
        dist.barrier()
        gate.opened.set()
        wait_for_checkpoint()
        dist.barrier()
        assert gate.events
    after = full_parameters(model)
    assert torch_moe_ep.latest_checkpoint(folder) == path
    assert load_checkpoint(path, model, optimizer) == 1
    loaded = full_parameters(model)
    assert all(torch.equal(loaded[name], before[name]) for name in before)
    assert not all(torch.equal(loaded[name], after[name]) for name in after)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@pytest.mark.parametrize("run", [RUN, Run("fsdp1", 2, 2), Run("ddp", 2, 1)], ids=str)
def test_training_goes_on_while_a_save_is_written(ranks, tmp_path, run):
    ranks(2).run(train_through_a_save, str(tmp_path), run)


def save_twice(folder: str) -> None:
    """The second save opens its folder after the first one's last write."""
    model = build(RUN)
    with pytest.MonkeyPatch.context() as patch:
        gate = Gate(patch)
        open_folder, wait = save_module._open, save_module.meet_when_written

        def watched_open(*args):
            gate.events.append("open")
            open_folder(*args)

        def watched_wait(call):
            if gate.events[-1:] == ["open"]:  # the second save has begun, the first one is held
                gate.opened.set()
            wait(call)

        patch.setattr(save_module, "_open", watched_open)
        patch.setattr(save_module, "meet_when_written", watched_wait)
        save_checkpoint(f"{folder}/one", model, step=1, async_save=True)
        if dist.get_rank() != 0:
            gate.events.append("open")
        save_checkpoint(f"{folder}/two", model, step=2, async_save=True, num_kept=1)
        writes = len(gate.events) - 2
        assert gate.events[0] == "open"
        if dist.get_rank() == 0:
            second = gate.events.index("open", 1)
            assert second > 1 and set(gate.events[1:second]) == {"write"}
        assert writes > 0
        wait_for_checkpoint()
    dist.barrier()
    assert sorted(child.name for child in Path(folder).iterdir()) == ["two"]
    assert load_checkpoint(f"{folder}/two", model) == 2


def test_second_save_waits_for_the_first(ranks, tmp_path):
    ranks(2).run(save_twice, str(tmp_path))


def fail_in_the_background(folder: str, next_call: str) -> None:
    """Rank 1's disk is full; every rank hears of it at its next call, and the one after works."""
    model = build(RUN)
    save_checkpoint(f"{folder}/one", model, step=1)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:

            def full_disk(*_args, **_kwargs):
                raise OSError("No space left on device")

            patch.setattr(filesystem, "_write_item", full_disk)  # fmt: skip
        save_checkpoint(f"{folder}/two", model, step=2, async_save=True)
        calls = {
            "save": lambda: save_checkpoint(f"{folder}/three", model, step=3),
            "load": lambda: load_checkpoint(f"{folder}/one", model),
            "wait": wait_for_checkpoint,
        }
        with pytest.raises(RuntimeError, match=r"two was not written: (?s:.)*No space left"):
            calls[next_call]()
        if next_call == "wait":  # and a save in the foreground raises as it is
            with pytest.raises(RuntimeError, match=r"two was not written: (?s:.)*No space left"):
                save_checkpoint(f"{folder}/two", model, step=2)
    dist.barrier()
    assert torch_moe_ep.latest_checkpoint(folder) == Path(folder) / "one"
    wait_for_checkpoint()
    dist.barrier()
    save_checkpoint(f"{folder}/three", model, step=3, num_kept=5)
    assert load_checkpoint(torch_moe_ep.latest_checkpoint(folder), model) == 3
    assert sorted(child.name for child in Path(folder).iterdir()) == ["one", "three"]


@pytest.mark.parametrize("next_call", ["save", "load", "wait"])
def test_failure_in_the_background_surfaces_at_the_next_call_on_every_rank(
    ranks, tmp_path, next_call
):
    ranks(2).run(fail_in_the_background, str(tmp_path), next_call)
