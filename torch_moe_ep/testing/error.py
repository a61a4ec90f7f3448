"""The one error measure: max|difference| / max|reference| over one tensor."""

from collections.abc import Mapping

import torch


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max|actual - reference| / max|reference|, in fp64.

    Both all zero: 0. A zero reference with any other value: infinity. A NaN on one side only:
    infinity; NaN in the same places counts as equal.
    """
    if actual.shape != reference.shape:
        raise ValueError(
            f"actual and reference must have one shape, got {tuple(actual.shape)} and "
            f"{tuple(reference.shape)}."
        )
    if reference.numel() == 0:
        return 0.0
    left, right = actual.detach().cpu().double(), reference.detach().cpu().double()
    if not torch.equal(left.isnan(), right.isnan()):
        return float("inf")
    left, right = left.nan_to_num(0.0), right.nan_to_num(0.0)
    difference = (left - right).abs().max().item()
    if difference == 0.0:
        return 0.0
    scale = right.abs().max().item()
    return difference / scale if scale > 0.0 else float("inf")


def assert_close(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    tolerance: float,
    what: str = "tensors",
) -> None:
    """Assert the same names and a relative error within `tolerance` for each; names the worst."""
    assert set(actual) == set(reference), (
        f"{what}: missing {sorted(set(reference) - set(actual))}, "
        f"unexpected {sorted(set(actual) - set(reference))}"
    )
    errors = {name: relative_error(actual[name], reference[name]) for name in reference}
    far = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not far, f"{what}: relative error over {tolerance}: " + ", ".join(
        f"{name} {error:.3g}" for name, error in sorted(far.items(), key=lambda item: -item[1])
    )
