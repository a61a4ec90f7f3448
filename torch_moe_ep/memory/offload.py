"""Activations in pinned host memory: copied out behind forward, loaded ahead of backward.

What autograd saves inside a wrapped module goes to the host through torch's saved-tensor hooks.
The frames of a forward, one per wrapped module, stand in order::

    forward   frame 0, 1, 2, 3      each copied out on the copy stream while the next computes
    backward  frame 3: its tensors are waited for; frames 2 and 1 begin to load (horizon 2)
              frame 2: is there already; frame 0 begins to load
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    ActivationWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.tensor import DTensor


def offload_activations(
    model: nn.Module,
    is_offloaded: Callable[[nn.Module], bool],
    *,
    horizon: int = 1,
    min_bytes: int = 64 * 1024,
) -> None:
    """Keep what backward needs of some modules in host memory, in place.

    Each module found is replaced by a wrapper, as torch's ``checkpoint_wrapper`` does; names in
    state dicts stay. Together with activation checkpointing inside (Hugging Face's, or torch's
    wrapper put on first) the inputs of the blocks alone are offloaded. Results are bit-equal.

    Args:
        model: any module, before or after FSDP.
        is_offloaded: which modules: usually decoder layers.
        horizon: how many wrapped modules ahead of backward are loaded; 0: each when it is needed,
            which backward waits for. Each costs the memory of its tensors while it waits.
        min_bytes: smaller tensors stay where they are.

    Raises:
        ValueError: a negative number, or no module was found.

    Parameters, tensors on the CPU and views that are not dense stay where they are: a model on
    the CPU computes as before. Under CUDA copies run on a stream of their own; forward and
    backward wait for them by events, not on the host. Local, no collective. Host memory: what is
    offloaded, pinned.
    """
    if horizon < 0 or min_bytes < 0:
        raise ValueError(
            f"horizon and min_bytes must be at least 0, got {horizon} and {min_bytes}."
        )
    line = Line(horizon, min_bytes)
    found: list[nn.Module] = []

    def wrap(module: nn.Module) -> nn.Module:
        found.append(module)
        return OffloadWrapper(module, line)

    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=is_offloaded)
    if not found:
        raise ValueError(
            f"is_offloaded chose no module of a {type(model).__name__}; it is called with every "
            f"module and must say True for those to offload."
        )


class OffloadWrapper(ActivationWrapper):
    """Runs a module with its saved tensors on the host."""

    def __init__(self, module: nn.Module, line: "Line") -> None:
        super().__init__(module)  # type: ignore[no-untyped-call]
        self.line = line

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; without gradients, as it is."""
        if not torch.is_grad_enabled():
            return self._checkpoint_wrapped_module(*args, **kwargs)
        frame = Frame(self.line, self._checkpoint_wrapped_module)
        try:
            with saved_tensors_hooks(frame.pack, frame.unpack):
                return self._checkpoint_wrapped_module(*args, **kwargs)
        finally:
            frame.close()


class Line:
    """The frames of a model in the order of forward, and the copy stream."""

    def __init__(self, horizon: int, min_bytes: int) -> None:
        self.horizon = horizon
        self.min_bytes = min_bytes
        self.frames: list[weakref.ref[Frame]] = []
        self._streams: dict[torch.device, Any] = {}

    def append(self, frame: "Frame") -> None:
        """Add the next frame of forward; frames that are gone leave."""
        self.frames = [ref for ref in self.frames if ref() is not None]
        self.frames.append(weakref.ref(frame))

    def before(self, frame: "Frame") -> "list[Frame]":
        """The frames that backward will want next, nearest first."""
        live = [other for ref in self.frames if (other := ref()) is not None]
        place = live.index(frame)
        return live[max(0, place - self.horizon) : place][::-1]

    def stream(self, device: torch.device) -> Any:
        """The copy stream of a device; None on the CPU."""
        if device.type == "cpu":
            return None
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]


class Frame:
    """What one run of a wrapped module saved."""

    def __init__(self, line: Line, module: nn.Module) -> None:
        self.line = line
        self.module = module
        self.packed: list[weakref.ref[Packed]] = []
        self.is_begun = False
        # While forward runs: tensors by identity, alive so that no other gets their address.
        self._known: dict[tuple[Any, ...], tuple[torch.Tensor, Packed]] = {}
        line.append(self)

    def close(self) -> None:
        """Forward is over."""
        self._known.clear()

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | Packed":
        """Called by autograd for each tensor that it saves."""
        if not _fits(tensor, self.line.min_bytes) or self._is_parameter(tensor):
            return tensor
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        if key in self._known:
            packed = self._known[key][1]
            packed.num_uses += 1
            return packed
        packed = Packed(self, tensor)
        self._known[key] = (tensor, packed)
        self.packed.append(weakref.ref(packed))
        return packed

    def unpack(self, packed: "torch.Tensor | Packed") -> torch.Tensor:
        """Called by autograd when backward needs the tensor."""
        if isinstance(packed, torch.Tensor):
            return packed
        if not self.is_begun:  # backward enters this module
            self.is_begun = True
            for frame in [self, *self.line.before(self)]:
                frame.load()
        return packed.take()

    def load(self) -> None:
        """Begin to load everything that is still wanted. Does not wait."""
        for ref in self.packed:
            packed = ref()
            if packed is not None:
                packed.load()

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in a parameter as it is now (under FSDP: gathered)."""
        address = tensor.untyped_storage().data_ptr()
        with torch.no_grad():
            for param in self.module.parameters():
                local = param.to_local() if isinstance(param, DTensor) else param
                if local.untyped_storage().data_ptr() == address:
                    return True
        return False


class Packed:
    """One saved tensor on the host, and on its device once it is loaded."""

    def __init__(self, frame: Frame, tensor: torch.Tensor) -> None:
        self.frame = frame  # keeps the frame, and its place in line, while anything of it is saved
        self.device = tensor.device
        self.num_uses = 1
        self._num_taken = 0
        self._loaded: torch.Tensor | None = None
        self._event: Any = None
        self._stream = frame.line.stream(tensor.device)
        self.host = torch.empty_like(
            tensor, device="cpu", pin_memory=self._stream is not None, requires_grad=False
        )
        if self._stream is None:
            self.host.copy_(tensor.detach())
            return
        self._stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self._stream:
            self.host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self._stream)

    def load(self) -> None:
        """Begin to copy it back, once. After the copy to the host: both are on one stream."""
        if self._loaded is not None or self._num_taken > 0:
            return
        if self._stream is None:
            self._loaded = self.host.clone(memory_format=torch.preserve_format)
            return
        with self._stream:
            self._loaded = torch.empty_like(self.host, device=self.device, pin_memory=False)
            self._loaded.copy_(self.host, non_blocking=True)
            self._event = self._stream.record_event()

    def take(self) -> torch.Tensor:
        """The tensor on its device; the compute stream waits for the copy."""
        if self._loaded is None:
            self._num_taken = 0  # again: the graph was retained
            self.load()
        loaded = self._loaded
        assert loaded is not None
        self._num_taken += 1
        if self._num_taken >= self.num_uses:
            self._loaded = None  # autograd holds it for as long as it needs it
        if self._stream is not None:
            stream = torch.accelerator.current_stream(self.device)
            stream.wait_event(self._event)
            loaded.record_stream(stream)
        return loaded


def _fits(tensor: torch.Tensor, min_bytes: int) -> bool:
    """Whether a tensor is worth moving, and comes back with the strides that it had."""
    if not _is_on_device(tensor) or type(tensor) not in (torch.Tensor, nn.Parameter):
        return False
    if tensor.layout != torch.strided or tensor.nbytes < max(1, min_bytes):
        return False
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"
