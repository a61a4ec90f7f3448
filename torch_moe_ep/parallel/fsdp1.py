"""Keep stock FSDP1 and DDP away from parameters that the experts shard themselves."""

from collections.abc import Iterator

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

from torch_moe_ep.parallel.state import iter_experts


def mark_experts(experts: nn.Module) -> None:
    """Make stock FSDP1 ignore an experts module; FSDP2 leaves it alone as well.

    Torch's composable-API registry says which parallelism a module already has. FSDP1 ignores
    every module whose entry is "replicate" (so does FSDP2 when it collects parameters), which is
    what torch's own `replicate()` relies on. The mark comes after `fully_shard(experts)`, which
    would find no parameters otherwise.
    """
    registry = experts.__dict__.setdefault(REGISTRY_KEY, {})
    registry.setdefault("replicate", RegistryItem())


def ignore_in_ddp(model: nn.Module) -> None:
    """Put the experts' parameters on the model's DistributedDataParallel ignore list."""
    given = list(model.__dict__.get("_ddp_params_and_buffers_to_ignore", []))
    model.__dict__["_ddp_params_and_buffers_to_ignore"] = _ExpertNames(model, given)


class _ExpertNames:
    """Parameter names of the experts, looked up when DDP asks.

    Activation-checkpoint wrappers put between apply and DDP change the names.
    """

    def __init__(self, model: nn.Module, given: list[str]) -> None:
        self._model = model
        self._given = given

    def __iter__(self) -> Iterator[str]:
        yield from self._given
        experts = {id(m) for module in iter_experts(self._model) for m in module.holders()}
        for module_name, module in self._model.named_modules():
            if id(module) in experts:
                for name, _ in module.named_parameters(recurse=False):
                    yield f"{module_name}.{name}" if module_name else name
