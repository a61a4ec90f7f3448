"""Run functions as ranks: forked worker processes over a file store, with a time-out per case.

    with RankPool(world_size=4) as pool:
        results = pool.run(function, argument, timeout_s=60)   # one result per rank

`function` is a module-level function; it runs on every rank inside a fresh process group and its
return value comes back by pickle. Workers are forked from a server process that has the heavy
imports done and has never run autograd (a forked process cannot run backward after its parent
did), so a pool of four starts in a fraction of a second. A failure or a time-out names the ranks
and shows what they were doing, and the pool starts fresh workers for the next case.
"""

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

DEFAULT_TIMEOUT_S = 60.0
GRACE_S = 3.0
NO_MESH = "Gloo connectFullMesh failed"  # at the start of a process group
PRELOAD = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",
    "transformers.models.mixtral.modeling_mixtral",
    "torch_moe_ep",
    "torch_moe_ep.testing",
)


class RankFailure(RuntimeError):
    """One or more ranks raised, died or hung; the message names them and says what they did.

    Attributes:
        results: what the other ranks returned, by rank.
    """

    def __init__(self, message: str, results: dict[int, Any]) -> None:
        super().__init__(message)
        self.results = results


class _NoMesh(RankFailure):
    """Gloo did not connect the ranks of a group."""


class RankPool:
    """`world_size` worker processes, started at the first `run`, that act as ranks.

    Args:
        world_size: number of ranks.
        backend: c10d backend of the default process group, one of `torch_moe_ep.hooks` among them;
            "" makes no process group.
        threads: torch intra-op threads per rank.
    """

    def __init__(self, world_size: int, *, backend: str = "gloo", threads: int = 1) -> None:
        self.world_size = world_size
        self.backend = backend
        self.threads = threads
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._case = 0

    def __enter__(self) -> "RankPool":
        """The pool itself; workers start at the first `run`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the pool."""
        self.close()

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        grace_s: float = GRACE_S,
        arg_of_rank: list[Any] | None = None,
    ) -> list[Any]:
        """Run `function(*args)` on every rank and return the results in rank order.

        Args:
            function: importable by name on the workers.
            args: pickled once, the same for all ranks.
            timeout_s: wall-clock limit of the whole case.
            grace_s: how long the other ranks may take to answer once one has failed.
            arg_of_rank: an extra first argument per rank.

        Raises:
            RankFailure: a rank raised, died or did not answer in time.
        """
        try:
            return self._run(function, args, timeout_s, grace_s, arg_of_rank)
        except _NoMesh:  # seen once in thousands of cases, on a busy machine: fresh workers
            return self._run(function, args, timeout_s, grace_s, arg_of_rank)

    def _run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        timeout_s: float,
        grace_s: float,
        arg_of_rank: list[Any] | None,
    ) -> list[Any]:
        if not self._workers:
            self._start()
        self._case += 1
        assert self._folder is not None
        store = str(Path(self._folder.name) / f"store{self._case}")
        for rank, (_, connection) in enumerate(self._workers):
            first = () if arg_of_rank is None else (arg_of_rank[rank],)
            connection.send_bytes(pickle.dumps((function, (*first, *args), store)))
        return self._collect(function, timeout_s, grace_s)

    def close(self) -> None:
        """End the workers this pool started and remove its folder."""
        for process, connection in self._workers:
            with contextlib.suppress(OSError):
                connection.send_bytes(pickle.dumps(None))
            process.join(timeout=1.0)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="torch_moe_ep_ranks_")
        context = _server_context()
        for rank in range(self.world_size):
            ours, theirs = multiprocessing.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, rank, self.world_size, self.backend, self.threads, self._log(rank)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _log(self, rank: int) -> str:
        assert self._folder is not None
        return str(Path(self._folder.name) / f"rank{rank}.log")

    def _collect(self, function: Callable[..., Any], timeout_s: float, grace_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), timeout=left):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    is_ok, value = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    failures[rank] = self._obituary(rank)
                else:
                    (results if is_ok else failures)[rank] = value
                if failures:
                    deadline = min(deadline, time.monotonic() + grace_s)
        if not waiting and not failures:
            return [results[rank] for rank in range(self.world_size)]
        limit = f"{grace_s:g} s of the failure" if failures else f"{timeout_s:g} s"
        message = self._report(function, limit, failures, sorted(waiting.values()))
        self._kill()
        has_mesh = all(NO_MESH not in text for text in failures.values())
        raise (RankFailure if has_mesh else _NoMesh)(message, results)

    def _report(
        self, function: Callable[..., Any], limit: str, failures: dict[int, str],
        silent: list[int],
    ) -> str:  # fmt: skip
        name = getattr(function, "__qualname__", repr(function))
        lines = [f"{name} on {self.world_size} ranks failed."]
        for rank, text in failures.items():
            lines.append(f"--- rank {rank} ---\n{text.rstrip()}")
        for rank in silent:
            lines.append(f"--- rank {rank} hung: no answer within {limit} ---\n{self._stack(rank)}")
        return "\n".join(lines)

    def _obituary(self, rank: int) -> str:
        process = self._workers[rank][0]
        process.join(timeout=2.0)
        return f"rank {rank} died with exit code {process.exitcode}\n{self._log_tail(rank)}"

    def _stack(self, rank: int) -> str:
        process = self._workers[rank][0]
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self._log_tail(rank)

    def _log_tail(self, rank: int) -> str:
        path = Path(self._log(rank))
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def _kill(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def share_the_gpu() -> int:
    """Let this rank use a GPU, its own where there are as many, else one beside others.

    Returns the rank. To be called before the first collective, which is when NCCL reads its
    settings: it refuses two ranks on one GPU unless each names another host, and they then talk
    over sockets: right values, no speeds. Symmetric memory refuses it too, unless told not to. For
    functions of a pool with ``backend="nccl"``.
    """
    rank = dist.get_rank()
    has_own = torch.cuda.device_count() >= dist.get_world_size()
    if not has_own:
        os.environ.update(
            LOCAL_RANK="0",
            NCCL_HOSTID=f"rank{rank}",
            NCCL_SOCKET_IFNAME="lo",
            NCCL_IB_DISABLE="1",
            NCCL_P2P_DISABLE="1",
            NCCL_SHM_DISABLE="1",
            TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1",
        )
    torch.cuda.set_device(rank if has_own else 0)
    torch.cuda.init()
    return rank


def _server_context() -> ForkServerContext:
    """The fork server's context; the server starts with the first worker of the session."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def _work(
    connection: Connection, rank: int, world_size: int, backend: str, threads: int, log: str
) -> None:
    """One worker: run cases until told to stop. Output goes to the rank's log file."""
    torch.set_num_threads(threads)
    if "nccl" not in backend:  # torch's defaults, FSDP2's mesh among them, prefer a GPU they see
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
    faulthandler.enable(file=output)
    gc.freeze()  # what was imported before the fork: collecting after each case stays cheap
    while True:
        message = connection.recv_bytes()
        is_ok = False
        try:
            job = pickle.loads(message)
            if job is None:
                return
            function, args, store = job
            _join(store, rank, world_size, backend)
            answer = pickle.dumps((True, function(*args)))
            is_ok = True
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
        _leave(is_ok)
        gc.collect()  # models are cyclic; the next case must not find the last one's


def _join(store: str, rank: int, world_size: int, backend: str) -> None:
    if not backend:
        return
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if backend.startswith("torch_moe_ep"):
        importlib.import_module("torch_moe_ep.hooks")  # registers them
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
    )


def _leave(is_ok: bool) -> None:
    """Destroy the process group, together: gloo fails on a peer that leaves while it connects.

    After a failure nobody waits; the pool ends all workers.
    """
    if not dist.is_initialized():
        return
    if is_ok:
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    dist.destroy_process_group()
    # DTensor caches process groups of this case by mesh; an equal mesh of the next would find them.
    _gen_transform_infos.cache_clear()
    _clear_sharding_prop_cache()
