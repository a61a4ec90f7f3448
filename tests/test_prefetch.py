"""FSDP2 gathers the next layer before this layer's rows leave: a count exchange blocks the CPU."""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, build
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from torch_moe_ep import ops
from torch_moe_ep.parallel.state import fsdp_param_groups, fsdp_state, is_fsdp2
from torch_moe_ep.testing import batch_of


def order_of_one_forward(run: Run) -> list[str]:
    """Names of gathered layers and "rows", in order, in a second forward."""
    model = build(run)
    model(**batch_of(dist.get_rank())).loss.backward()
    log: list[str] = []
    owner = {}
    for name, module in model.named_modules():
        if is_fsdp2(module):
            for group in fsdp_param_groups(module):
                owner[group] = name.removesuffix(".mlp.experts")
    unshard, dispatch = FSDPParamGroup.unshard, ops.dispatch

    def logged_unshard(self, async_op=False):
        if self._all_gather_result is None and not self.is_unsharded:
            log.append(owner[self])
        return unshard(self, async_op)

    def logged_dispatch(*args, **kwargs):
        log.append("rows")
        return dispatch(*args, **kwargs)

    FSDPParamGroup.unshard, ops.dispatch = logged_unshard, logged_dispatch
    try:
        with torch.no_grad():
            model(**batch_of(dist.get_rank()))
    finally:
        FSDPParamGroup.unshard, ops.dispatch = unshard, dispatch
    return log


@pytest.mark.parametrize("world", [2, 4])
def test_next_layer_is_gathered_before_rows_leave(ranks, world):
    run = Run("fsdp2", world, 2, model={"num_hidden_layers": 3})
    for log in ranks(world).run(order_of_one_forward, run):
        first, second, third = (i for i, what in enumerate(log) if what == "rows")
        layers = [what for what in log[:first] if "layers" in what]
        assert set(layers) == {"model.layers.0", "model.layers.1"}
        assert set(log[first + 1 : second]) == {"model.layers.2"}
        assert log[second + 1 : third] == []


def prefetch_list_of_the_user() -> bool:
    model = build(Run("fsdp2", 2, 2, model={"num_hidden_layers": 3}))
    layers = model.model.layers
    layers[0].mlp.experts.set_modules_to_forward_prefetch([layers[2]])
    model(**batch_of(dist.get_rank()))
    found = fsdp_state(layers[0].mlp.experts)._states_to_forward_prefetch
    return found == [fsdp_state(layers[2])]


def test_prefetch_lists_that_the_user_has_set_stay(ranks):
    assert ranks(2).run(prefetch_list_of_the_user) == [True, True]
