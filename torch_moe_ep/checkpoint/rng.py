"""The state of this process's random generators: python, numpy, torch on the CPU and on CUDA.

Everything is held in tensors, numbers and tuples, so that it can be read back without pickle's
code execution (``weights_only``).
"""

import hashlib
import random
import sys
from collections.abc import Callable
from typing import Any

import torch

State = dict[str, Any]


def rng_state() -> State:
    """The generators' states by name; numpy's and CUDA's only where they are in use.

    Local; "cuda" is the current device's generator. No host sync.
    """
    state: State = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: State) -> None:
    """Put back what `rng_state` gave; generators that this process lacks are passed over."""
    for name, value in state.items():
        setter = _SETTERS.get(name)
        if setter is not None:
            setter(value)


def reseed(state: State, rank: int) -> State:
    """States for a rank that the save did not have, from those of one that it had.

    Each generator is seeded from (its saved state, rank): the same at every resume, different
    from rank to rank. The caller's generators keep their states.
    """
    before = rng_state()
    try:
        for name, value in state.items():
            seed = int.from_bytes(_digest((value, rank))[:4], "little")
            seeder = _SEEDERS.get(name)
            if seeder is not None:
                seeder(seed)
        return {name: value for name, value in rng_state().items() if name in state}
    finally:
        set_rng_state(before)


def digests(state: State) -> dict[str, str]:
    """A short digest of each generator's state, to compare ranks by."""
    return {name: _digest(value).hex() for name, value in state.items()}


def _digest(value: Any) -> bytes:
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        elif isinstance(part, (tuple, list)):
            digest.update(b"(")
            for item in part:
                add(item)
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.digest()


def _set_numpy(value: Any) -> None:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = value
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))


def _seed_numpy(seed: int) -> None:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def _set_cuda(value: torch.Tensor) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(value)


def _seed_cuda(seed: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


_SETTERS: dict[str, Callable[[Any], object]] = {
    "python": random.setstate,
    "numpy": _set_numpy,
    "torch": torch.set_rng_state,
    "cuda": _set_cuda,
}
_SEEDERS: dict[str, Callable[[int], object]] = {
    "python": random.seed,
    "numpy": _seed_numpy,
    "torch": torch.default_generator.manual_seed,
    "cuda": _seed_cuda,
}
