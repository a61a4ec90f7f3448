"""FSDP2 gathers the next layer before this layer's rows leave: a count exchange blocks the CPU."""

import pytest
import torch
import torch.distributed as dist
from parallel_cases import Run, backward, build
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from torch_moe_ep import ops
from torch_moe_ep.parallel.state import fsdp_param_groups, fsdp_state, is_fsdp2
from torch_moe_ep.testing import assert_close, batch_of, tiny_mixtral
from torch_moe_ep.testing.parallel import from_rank0, full_gradients
from torch_moe_ep.testing.reference import reference_gradients


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


class EarlyExit(Exception):
    """Raised by a hook to leave a forward after the first layer."""


def gradients_after_an_early_exit(run: Run) -> dict[str, torch.Tensor]:
    """Gradients of a step after an evaluation of one layer alone, and a change of weights."""
    model = build(run)
    backward(run, model)
    model.zero_grad()

    def leave(*_unused: object) -> None:
        raise EarlyExit

    first = next(module for module in model.modules() if isinstance(module, MixtralDecoderLayer))
    hook = first.register_forward_hook(leave)
    with torch.no_grad(), pytest.raises(EarlyExit):
        model(**batch_of(dist.get_rank(), step=9))
    hook.remove()
    if run.wrap == "fsdp2":
        model.reshard()  # FSDP2 leaves its root gathered
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)
    backward(run, model)
    return from_rank0(full_gradients(model))


@pytest.mark.parametrize("wrap", ["fsdp2", "ddp"])
def test_what_was_gathered_ahead_and_left_is_not_used_after_weights_changed(ranks, wrap):
    run = Run(wrap, 2, 1, model={"num_hidden_layers": 3})

    def halved() -> torch.nn.Module:
        model = tiny_mixtral(**run.model)
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.5)
        return model

    actual = ranks(2).run(gradients_after_an_early_exit, run)[0]
    assert_close(actual, reference_gradients(halved, [batch_of(0), batch_of(1)])[1], 2e-5)
