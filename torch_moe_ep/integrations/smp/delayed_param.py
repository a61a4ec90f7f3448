"""``DelayedParamIniter``: weights of a model on the meta device, drawn one module at a time.

Each parameter's values come from a generator of its own, seeded by (random_seed, module name), on
the CPU: the same at every number of ranks and every degree, and the whole model never exists.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from torch_moe_ep.integrations.smp import config as smp_config
from torch_moe_ep.integrations.transformers import find_experts, initializer_range
from torch_moe_ep.layer import ExpertParallelExperts
from torch_moe_ep.parallel.initialize import draw_expert
from torch_moe_ep.parallel.swap import WEIGHT_NAMES
from torch_moe_ep.seed import seed_of


class DelayedParamIniter:
    """Initialises a transformed model module by module, as FSDP asks for it.

    Args:
        model: a Hugging Face model; its `_init_weights` draws, for modules that have no
            `reset_parameters` of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._experts = {id(module) for module in find_experts(model)[0].values()}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # old (kept alive), new

    def get_param_init_fn(self) -> Callable[[nn.Module], None]:
        """FSDP's `param_init_fn`: materialises one module's own meta tensors and draws them."""
        return self._init_module

    def get_post_param_init_fn(self) -> Callable[[nn.Module], None]:
        """SMP's `post_param_init_fn`: checks that nothing of a module is left on meta."""
        return _check_initialised

    @contextlib.contextmanager
    def validate_params_and_buffers_inited(self) -> Iterator[None]:
        """Around FSDP: raises ValueError afterwards if a parameter or buffer is still on meta."""
        yield
        _check_initialised(self.model)

    @torch.no_grad()
    def _init_module(self, module: nn.Module) -> None:
        own = [*module._parameters.values(), *module._buffers.values()]
        if isinstance(module, ExpertParallelExperts) or not any(
            tensor is not None and tensor.is_meta for tensor in own
        ):
            return
        is_tied = all(param is None or id(param) in self._made for param in own)
        self._materialise(module, torch.device("cpu"))
        name = self._names.get(id(module), "")
        if id(module) in self._experts:
            self._draw_experts(module, name)
        elif not is_tied:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(f"{smp_config.current().random_seed}/{name}"))
                _draw(self.model, module)
        if torch.cuda.is_available():
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None:
                        tensor.data = tensor.data.cuda()

    def _draw_experts(self, module: nn.Module, layer: str) -> None:
        """Experts that were left as they are get the bits that expert-parallel ones would get."""
        seed, std = smp_config.current().random_seed, initializer_range(self.model)
        for name in WEIGHT_NAMES:
            param = module._parameters[name]
            assert param is not None
            for expert in range(param.shape[0]):
                part = draw_expert((seed, layer, name), expert, list(param.shape[1:]), std)
                param[expert].copy_(part)

    def _materialise(self, module: nn.Module, device: torch.device) -> None:
        """Empty tensors in the place of meta ones; tied parameters stay tied."""
        for name, param in module._parameters.items():
            if param is None or not param.is_meta:
                continue
            if id(param) not in self._made:
                empty = torch.empty(param.shape, dtype=param.dtype, device=device)
                self._made[id(param)] = (param, nn.Parameter(empty, param.requires_grad))
            module._parameters[name] = self._made[id(param)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def _draw(model: nn.Module, module: nn.Module) -> None:
    init: Any = getattr(model, "_init_weights", None)
    if callable(init):
        init(module)
        return
    reset: Any = getattr(module, "reset_parameters", None)
    if reset is None:
        raise ValueError(
            f"{type(module).__name__} has no reset_parameters and the model no _init_weights; "
            f"initialise it before FSDP."
        )
    reset()


def _check_initialised(module: nn.Module) -> None:
    named = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in named if tensor.is_meta]
    if left:
        raise ValueError(
            f"{len(left)} parameters and buffers are still on the meta device, {left[0]} first; "
            f"pass DelayedParamIniter's functions to FSDP."
        )
