"""Which experts classes the installed transformers has, and which of them can be swapped.

A class is judged by what it is: it is built on the meta device from its model's own default
configuration (no memory, no download) and asked the same questions as a module of a user's model.
"""

import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_moe_ep.integrations.transformers import misfit_of

OPEN_SIZE = 8  # stands for a size that the default configuration leaves open


class ExpertsClass(NamedTuple):
    """One experts class of transformers.

    Attributes:
        model_type: transformers' name of the model, such as "qwen3_moe".
        name: of the class.
        misfit: why it cannot be made expert-parallel, one sentence; None where it can.
    """

    model_type: str
    name: str
    misfit: str | None


def find_experts_classes() -> list[ExpertsClass]:
    """List every experts class of the installed transformers, by model.

    Raises:
        ImportError: transformers is not installed.

    Not collective. Imports the modeling file of every mixture of experts (seconds).
    """
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    found: list[ExpertsClass] = []
    for path in sorted(folder.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"^class (\w*Experts)\(nn\.\w+\)", text, re.MULTILINE):
            is_shared = name.endswith("SharedExperts") and "self.experts = " + name not in text
            if not is_shared:
                found.append(ExpertsClass(path.parent.name, name, _misfit(path, name)))
    return found


def _misfit(path: Path, name: str) -> str | None:
    package = f"transformers.models.{path.parent.name}"
    experts_class = getattr(importlib.import_module(f"{package}.{path.stem}"), name)
    module = _build(experts_class, _config_classes(path.parent))
    if module is None:
        return "its class takes more than a configuration, so it is not fused experts"
    return misfit_of(module)


def _config_classes(folder: Path) -> list[type]:
    """The configuration classes of a model, a text model's own first."""
    from transformers import PretrainedConfig

    found: list[type] = []
    for path in sorted(folder.glob("configuration_*.py")):
        module = importlib.import_module(f"transformers.models.{folder.name}.{path.stem}")
        found += [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, PretrainedConfig)
            and value.__module__ == module.__name__
        ]
    return sorted(found, key=lambda config_class: "Text" not in config_class.__name__)


def _build(experts_class: type[nn.Module], config_classes: list[type]) -> nn.Module | None:
    """One module on the meta device, from the first configuration that has what it asks for."""
    parameters = inspect.signature(experts_class).parameters
    wanted = getattr(parameters.get("config"), "annotation", None)
    own = [c for c in config_classes if wanted in (c, c.__name__)]
    sizes = {name: OPEN_SIZE for name in ("intermediate_size",) if name in parameters}
    for config_class in [*own, *config_classes]:
        try:
            with torch.device("meta"):
                return experts_class(_Filled(config_class()), **sizes)
        except (AttributeError, TypeError):  # another configuration's fields, or more arguments
            continue
    return None


class _Filled:
    """A configuration whose open sizes (None) are filled."""

    def __init__(self, config: Any) -> None:
        self._config = config

    @functools.cached_property
    def _experts_implementation(self) -> str:
        return "eager"

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        return OPEN_SIZE if value is None else value
