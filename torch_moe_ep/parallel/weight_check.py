"""A warning when ranks hold different weights as their experts are spread.

Each rank keeps its own part of what it holds: ranks that started from different seeds put a model
together that nobody built. Nothing fails then, and only a loss that starts too high tells.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


def weights_note(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The last number of each weight ``[E, a, b]``, by name; nothing of what is on meta.

    One copy to the host, which waits for the device.
    """
    real = {name: w.detach()[-1, -1, -1] for name, w in weights.items() if not w.is_meta}
    if not real:
        return {}
    numbers: Iterable[float] = torch.stack(list(real.values())).double().tolist()
    return {name: f"{number:.9g}" for name, number in zip(real, numbers, strict=True)}


def warn_of_different_weights(notes: Sequence[dict[str, Any]]) -> None:
    """Warn where the `weights_note` of a rank differs from rank 0's; `notes` in rank order."""
    for rank, note in enumerate(notes):
        for name, value in note.items():
            if notes[0].get(name) != value:
                warnings.warn(
                    f"ranks 0 and {rank} hold different weights (the last number of {name} is "
                    f"{notes[0].get(name)} and {value}), and each will keep its part of its own: "
                    f"seed ranks alike before the model is built, load one folder on all, or pass "
                    f"sync_from_rank0=True. Only where load_checkpoint or load_hf follows it does "
                    f"not matter.",
                    stacklevel=4,
                )
                return
