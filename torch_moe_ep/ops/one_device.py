"""What fake kernels check: with one meta tensor among real ones torch calls them for real."""

import torch


def check_one_device(**tensors: torch.Tensor | None) -> None:
    """Check that tensors are where the first is, as the operators themselves do.

    Args:
        tensors: by the name of the argument; None counts as absent.

    Raises:
        ValueError: one is elsewhere. Without it a weight on the meta device beside tokens on the
            CPU would give memory that nobody wrote.
    """
    (first_name, first), *others = tensors.items()
    assert first is not None
    for name, tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but {first_name} is on {first.device} (move one of "
                f"them)"
            )
