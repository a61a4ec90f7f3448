"""Trap 23: EP partners given the same batch by the data loader."""

import warnings

import pytest
import torch.distributed as dist
from parallel_cases import Run, build

from torch_moe_ep.testing import batch_of


def warnings_on_rank(run: Run, batches: list[int], is_training: bool) -> list[str]:
    """Messages of two forward calls; `batches` says which batch each rank takes."""
    model = build(run).train(is_training)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**batch_of(batches[dist.get_rank()]))
    return [str(w.message) for w in caught if "same batch" in str(w.message)]


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "ddp"])
def test_trap_23_equal_batches_in_an_ep_group_warn_once_and_name_ranks(ranks, kind):
    found = ranks(4).run(warnings_on_rank, Run(kind, 4, 2), [0, 1, 2, 2], True)
    assert found[:2] == [[], []]
    for messages in found[2:]:
        assert len(messages) == 1 and "ranks [2, 3]" in messages[0]


@pytest.mark.parametrize(
    ("batches", "is_training"),
    [([0, 1, 0, 1], True), ([0, 0, 0, 0], False)],
    ids=["other_group", "evaluation"],
)
def test_trap_23_no_warning_for_other_groups_or_evaluation(ranks, batches, is_training):
    assert ranks(4).run(warnings_on_rank, Run("fsdp2", 4, 2), batches, is_training) == [[]] * 4
