"""``TransformerLayer``: stands for the decoder layer's class in wrap policies and isinstance."""

from torch import nn

_layer_classes: set[type[nn.Module]] = set()


class _AnyLayer(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, tuple(_layer_classes))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, tuple(_layer_classes))


class TransformerLayer(metaclass=_AnyLayer):
    """An instance is any decoder layer of a model that `transform` has seen.

    SMP puts its own layer in the place of Hugging Face's; here Hugging Face's stays, and this
    class answers for it in ``transformer_auto_wrap_policy`` and ``check_fn``.
    """


def note_layers(model: nn.Module, names: list[str]) -> None:
    """Remember the classes of the decoder layers: of the list items above the named modules."""
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            parent = model.get_submodule(".".join(parts[: depth - 1]))
            if isinstance(parent, nn.ModuleList):
                _layer_classes.add(type(model.get_submodule(".".join(parts[:depth]))))
                break
