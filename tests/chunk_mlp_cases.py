"""Buffers of all chunks for the operators of expert_mlp that take one chunk's segments."""

import copy
import dataclasses
import itertools

import torch


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of buffers; `lengths` are the rows of each expert in each chunk."""

    lengths: tuple[tuple[int, ...], ...]
    hidden: int = 16
    width: int = 24
    dtype: torch.dtype = torch.float32
    num_unowned: int = 2  # rows behind the last segment

    def __str__(self) -> str:
        experts, chunks = len(self.lengths), len(self.lengths[0])
        return f"E{experts}-C{chunks}-H{self.hidden}-I{self.width}-{self.dtype}"


class Whole:
    """Rows, upstream gradients and experts."""

    def __init__(self, sizes: Sizes, device: str = "cpu") -> None:
        self.lengths, self.hidden, self.width = sizes.lengths, sizes.hidden, sizes.width
        self.dtype, self.device = sizes.dtype, device
        self.num_chunks = len(sizes.lengths[0])
        bounds = list(itertools.accumulate(itertools.chain(*sizes.lengths), initial=0))
        self.host_offsets = torch.tensor(bounds)
        self.offsets = self.host_offsets.to(device)
        self.num_slots = bounds[-1] + sizes.num_unowned
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul(scale).to(self.dtype)

        self.rows = normal(self.num_slots, self.hidden)
        self.grad_y = normal(self.num_slots, self.hidden)
        self.row_weights = torch.rand(self.num_slots, generator=generator, device=device)
        experts, hidden, width = len(self.lengths), self.hidden, self.width
        self.experts = (
            normal(experts, 2 * width, hidden, scale=hidden**-0.5),
            normal(experts, hidden, width, scale=width**-0.5),
        )

    def in_float32(self) -> "Whole":
        """The same values in fp32."""
        found = copy.copy(self)
        found.dtype = torch.float32
        found.rows, found.grad_y = self.rows.float(), self.grad_y.float()
        found.experts = (self.experts[0].float(), self.experts[1].float())
        return found

    def of_all_chunks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """expert_offsets and host_offsets of the experts' rows in all chunks."""
        offsets = self.host_offsets[:: self.num_chunks].clone()
        return offsets.to(self.device), offsets

    def segments(
        self, chunk: int, is_known: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """segment_offsets, host_offsets, num_chunks and chunk."""
        return self.offsets, self.host_offsets[: None if is_known else 0], self.num_chunks, chunk

    def rows_of(self, chunk: int) -> torch.Tensor:
        """Which slots are the chunk's, a mask."""
        mask = torch.zeros(self.num_slots, dtype=torch.bool)
        for segment in range(chunk, len(self.lengths) * self.num_chunks, self.num_chunks):
            mask[self.host_offsets[segment] : self.host_offsets[segment + 1]] = True
        return mask.to(self.device)

    def owned(self) -> torch.Tensor:
        """Which slots are any chunk's, a mask."""
        return torch.arange(self.num_slots, device=self.device) < self.host_offsets[-1]

    def empty(self, *columns: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A result's buffer; what is not written stays 7."""
        sizes = (self.num_slots, *columns)
        return torch.full(sizes, 7.0, dtype=dtype or self.dtype, device=self.device)

    def gradient_buffers(self) -> tuple[torch.Tensor, ...]:
        """For grad_rows, grad_row_weights, grad_z and activation."""
        return (
            self.empty(self.hidden),
            self.empty(dtype=torch.float32),
            self.empty(2 * self.width),
            self.empty(self.width),
        )


def poisoned(tensor: torch.Tensor, is_read: torch.Tensor) -> torch.Tensor:
    """NaN in all rows but these."""
    return tensor.masked_fill(~is_read.view(-1, *[1] * (tensor.dim() - 1)), float("nan"))


def is_untouched(tensor: torch.Tensor, is_written: torch.Tensor) -> bool:
    """Whether the other rows are as `Whole.empty` made them."""
    return bool((tensor[~is_written] == 7).all())
