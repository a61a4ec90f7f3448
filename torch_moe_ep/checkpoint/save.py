"""Save a checkpoint to resume from, at once or in the background."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save as save_in_background
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torch_moe_ep.checkpoint.folder import (
    HUB_FOLDER,
    check_alike,
    complete_checkpoints,
    file_sizes,
    on_rank0,
    open_partial,
    partial_of,
    publish,
    raise_alike,
    remove_checkpoint,
    remove_partials,
    shared_failure,
    write_marker,
)
from torch_moe_ep.checkpoint.hub_writer import save_config
from torch_moe_ep.checkpoint.quiet import without_fsdp1_warnings
from torch_moe_ep.checkpoint.rank_state import collect_host, routing_state, sharded_state
from torch_moe_ep.checkpoint.weights import check_wrappers, inner_model
from torch_moe_ep.parallel.agreement import meet
from torch_moe_ep.parallel.state import states_of


@dataclass
class _Background:
    """A save under way: `done` ends with the marker on rank 0, with the last file elsewhere."""

    folder: Path
    done: "Future[None]"


_under_way: _Background | None = None
_writers: tuple[Any, dist.ProcessGroup] | None = None  # (default group, its group for writing)


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int = 0,
    scheduler: LRScheduler | None = None,
    data_state: Any = None,
    async_save: bool = False,
    num_kept: int | None = None,
) -> None:
    """Save all that a run needs to go on: weights, optimizer, scheduler, generators, data position.

    The random generators of python, numpy (where it is imported), torch and CUDA are saved for
    every rank without being asked for, and the counters of tokens per expert. The checkpoint
    appears under `path` in one rename when it is complete; until then it is in ``<path>.partial``.
    A kill at any moment leaves every complete checkpoint loadable, an overwritten one included.

    Args:
        path: the checkpoint's own folder, the same on all ranks, on a file system that they share.
            One that exists is replaced. (Nodes may write to folders of the same name on disks of
            their own that somebody puts together afterwards.)
        model: patched or not, under FSDP2, FSDP1, DDP or nothing; the wrapper, if it is FSDP1's.
        optimizer: its state is saved by parameter name.
        step: handed back by `load_checkpoint`, and what "latest" goes by.
        scheduler: its state dict is saved (rank 0's).
        data_state: this rank's position in its data, such as a data loader's state dict; read
            back by `load_data_state`. Tensors, numbers, strings, None, and dicts, lists and
            tuples of them.
        async_save: return as soon as everything is copied to the host, and write in a thread.
            The copy takes as much host memory as this rank's part of the checkpoint. The next
            `save_checkpoint`, `load_checkpoint` or `wait_for_checkpoint` waits for the writing,
            and raises when it failed; call `wait_for_checkpoint` before the process group is
            destroyed.
        num_kept: keep only this many complete checkpoints in the folder that holds `path`, the
            ones with the highest steps, and remove what killed saves left there; `path` itself
            always stays. None keeps all.

    Raises:
        ValueError: on every rank: num_kept below 1, a path, step or optimizer that is not the same
            on all, a state that is not made of plain values, or a model without the FSDP1 wrapper
            around it.
        RuntimeError: on every rank, when a file could not be written, now or by the save in the
            background before this one. A rank did not come within the time-out; the message names
            it.

    Collective over all ranks; every rank writes its own shards. Syncs the host. Blocks until the
    files are written, with `async_save` until they are copied.
    """
    if num_kept is not None and num_kept < 1:
        raise ValueError(f"num_kept must be None or at least 1, got {num_kept}.")
    check_wrappers(model)
    meet_when_written("save_checkpoint")
    folder = Path(os.path.abspath(path))
    optimizer_name = "no optimizer" if optimizer is None else type(optimizer).__name__
    check_alike(
        {"the folder's name": folder.name, "step": str(step), "optimizer": optimizer_name},
        of_node={"path": str(folder)},
    )
    state = _collect(model, optimizer, scheduler, data_state)
    marker = {"step": int(step), **_description(model, state)}
    on_rank0(functools.partial(_open, folder, model))
    close = functools.partial(_close, folder, marker, num_kept)
    if async_save:
        _start(folder, state, close)
        return
    failure: BaseException | None = None
    try:
        with without_fsdp1_warnings():
            save(state, checkpoint_id=partial_of(folder))
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failure = error
    _raise_failed(folder, failure)
    on_rank0(close)


def wait_for_checkpoint() -> None:
    """Wait for the save in the background, if there is one.

    Raises:
        RuntimeError: on every rank, when it failed; the folder is then no checkpoint. A rank did
            not come within the time-out; the message names it.

    Collective over all ranks when a save is under way; else returns at once.
    """
    if _under_way is not None:
        meet_when_written("wait_for_checkpoint")


def meet_when_written(call: str) -> None:
    """Wait for the save in the background, if there is one, then for all ranks to come to `call`.

    In this order, since the thread that writes may need the store, which is waited for in `meet`.

    Raises:
        RuntimeError: on every rank, when that save failed; or a rank did not come.

    Collective over all ranks.
    """
    global _under_way
    failure = None if _under_way is None else _under_way.done.exception()
    meet(call)
    pending, _under_way = _under_way, None
    if pending is not None:
        _raise_failed(pending.folder, failure)


@without_fsdp1_warnings()
def _collect(
    model: nn.Module, optimizer: Optimizer | None, scheduler: LRScheduler | None, data_state: Any
) -> dict[str, Any]:
    """Everything that is saved, as torch.distributed.checkpoint takes it. Collective."""
    host: dict[str, torch.Tensor] = {}
    failure: Exception | None = None
    try:
        host = collect_host(scheduler, data_state)
    except ValueError as error:
        failure = error
    raise_alike(failure)
    state = sharded_state(model, optimizer)
    return {**state, "routing": routing_state(model), "host": host}


def _description(model: nn.Module, saved: dict[str, Any]) -> dict[str, Any]:
    """What the marker says for people and for the command line."""
    states = states_of(model)
    mesh = states[0].mesh if states else None
    return {
        "world_size": dist.get_world_size(),
        "grid": None if mesh is None else dict(
            zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)
        ),
        "has_optimizer": "optimizer" in saved,
        "experts": [name for state in states for name in state.experts],
        "torch": torch.__version__,
    }  # fmt: skip


def _open(folder: Path, model: nn.Module) -> None:
    partial = open_partial(folder)
    inner: Any = inner_model(model)
    if hasattr(inner, "save_pretrained"):  # writes the config alone
        save_config(inner, partial / HUB_FOLDER)


def _close(folder: Path, marker: dict[str, Any], num_kept: int | None) -> None:
    partial = partial_of(folder)
    write_marker(partial, {**marker, "files": file_sizes(partial)})
    publish(folder)
    if num_kept is None:
        return
    others = [path for path in complete_checkpoints(folder.parent) if path.name != folder.name]
    for old in others[: max(0, len(others) + 1 - num_kept)]:
        remove_checkpoint(old)
    remove_partials(folder.parent)


def _start(folder: Path, state: dict[str, Any], close: Callable[[], None]) -> None:
    """Copy the state to the host and let torch write it in a thread; rank 0 closes the folder."""
    global _under_way
    done: Future[None] = Future()
    is_closer = dist.get_rank() == 0

    def finish(written: "Future[Any]") -> None:
        try:
            written.result()
            if is_closer:
                close()
        except BaseException as error:  # raised by whoever waits
            done.set_exception(error)
        else:
            done.set_result(None)

    written = save_in_background(
        state,
        checkpoint_id=partial_of(folder),
        process_group=_writing_group(),
        async_stager=BlockingAsyncStager(),  # torch's default one cannot copy FSDP1's shards
    )
    assert isinstance(written, Future)
    written.add_done_callback(finish)
    _under_way = _Background(folder, done)


def _writing_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for the writing thread: training's own collectives go on beside."""
    global _writers
    default = dist.group.WORLD
    if _writers is None or _writers[0] is not default:
        _writers = (default, dist.new_group(backend="gloo"))
    return _writers[1]


def _raise_failed(folder: Path, failure: BaseException | None) -> None:
    reason = shared_failure(failure)
    if reason is not None:
        raise RuntimeError(
            f"the checkpoint {folder} was not written: {reason.strip()}. Earlier checkpoints are "
            f"as they were."
        ) from failure
