"""`set_fsdp_all_gather` where no copy engine can serve: FSDP2's own all-gather stays, said once."""

import logging

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, backward, build
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from torch_moe_ep import set_fsdp_all_gather
from torch_moe_ep.parallel import fsdp_all_gather
from torch_moe_ep.parallel.state import fsdp_param_groups, is_fsdp2
from torch_moe_ep.testing.parallel import from_rank0, full_gradients


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def fallen_back(kind: str):
    """What was set, what was logged, whether every module is as before, and gradients."""
    lines = Lines()
    fsdp_all_gather.logger.addHandler(lines)
    fsdp_all_gather.logger.setLevel(logging.INFO)
    run = Run("fsdp2", 2, 1)
    model = build(run)
    found = set_fsdp_all_gather(model, kind)
    fsdp_all_gather.logger.removeHandler(lines)
    groups = [
        group
        for module in model.modules()
        if is_fsdp2(module)
        for group in fsdp_param_groups(module)
    ]
    is_stock = all(type(group._all_gather_comm) is DefaultAllGather for group in groups)
    backward(run, model)
    return found, lines.lines, len(groups), is_stock, from_rank0(full_gradients(model))


def plain_gradients():
    run = Run("fsdp2", 2, 1)
    model = build(run)
    backward(run, model)
    return from_rank0(full_gradients(model))


@pytest.mark.parametrize("kind", fsdp_all_gather.KINDS)
def test_on_the_cpu_the_default_stays_and_one_line_says_why(ranks, kind):
    expected = ranks(2).run(plain_gradients)[0]
    results = ranks(2).run(fallen_back, kind)
    said = (
        "set_fsdp_all_gather: FSDP2's own all-gather stays, since its parameters are not on GPUs."
    )
    for rank, (found, lines, num_groups, is_stock, _) in enumerate(results):
        assert found == "default"
        assert num_groups > 2
        assert is_stock
        assert lines == ([said] if rank == 0 else [])
    for name, gradient in expected.items():
        assert torch.equal(results[0][4][name], gradient), name


def refusals() -> list[str]:
    said = []
    model = build(Run("fsdp2", 2, 2))
    cases = [(model, "fast"), (torch.nn.Linear(2, 2), "auto")]
    first = next(m for m in model.modules() if is_fsdp2(m) and fsdp_param_groups(m))

    class Own(DefaultAllGather.__mro__[2]):  # FSDP2's interface
        def allocate(self, size, *, dtype, device):
            return torch.empty(*size, dtype=dtype, device=device)

        def __call__(self, output_tensor, input_tensor, group, async_op=False):
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)

    for module, kind in cases:
        with pytest.raises(ValueError) as caught:
            set_fsdp_all_gather(module, kind)
        said.append(str(caught.value))
    first.set_custom_all_gather(Own())
    with pytest.raises(ValueError) as caught:
        set_fsdp_all_gather(model)
    return [*said, str(caught.value)]


def test_unknown_kind_missing_fsdp2_and_a_custom_all_gather_are_refused(ranks):
    for kind, missing, custom in ranks(2).run(refusals):
        assert kind == "kind must be one of auto, nccl, copy_engine, got 'fast'."
        assert (
            "the model has no FSDP2 module; call set_fsdp_all_gather after fully_shard" in missing
        )
        assert "gathers by Own already" in custom
