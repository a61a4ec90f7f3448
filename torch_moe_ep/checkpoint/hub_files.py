"""The safetensors files of a Hugging Face folder: headers at once, bytes on demand."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1,
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass
class LoadReport:
    """What one rank requested from the files, in bytes of the files' dtypes."""

    expert_bytes: int = 0
    dense_bytes: int = 0


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor: its file's name, dtype (``"BF16"``) and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class HubFiles:
    """A folder's tensors by name; keeps its files open until `close`.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and what it names.

    Raises:
        ValueError: no safetensors weights, an index that names a missing file or one outside of
            the folder or disagrees with its files, or a file that is truncated.

    Opening reads the headers alone. Not collective.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = LoadReport()
        self.headers: dict[str, Header] = {}
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, key: str, index: tuple[slice, ...], *, is_expert: bool) -> torch.Tensor:
        """Read one block of one tensor onto the CPU; the only place that reads weights.

        Args:
            key: a name in `headers`.
            index: a non-empty slice per dimension, without steps.
            is_expert: which count of the report the bytes go to.
        """
        header = self.headers[key]
        if header.shape:
            block: torch.Tensor = self._files[header.file].get_slice(key)[index]
        else:
            block = self._files[header.file].get_tensor(key)
        num_bytes = block.numel() * ITEM_BYTES[header.dtype]
        if is_expert:
            self.report.expert_bytes += num_bytes
        else:
            self.report.dense_bytes += num_bytes
        return block

    def _open(self) -> None:
        weight_map = None if (self.folder / SINGLE).is_file() else self._read_index()
        for name in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
            file = self._files[name] = self._open_file(name)
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if weight_map is not None and weight_map.get(key) != name:
                    raise ValueError(
                        f"{name} of {self.folder} holds {key}, which {INDEX} does not say; "
                        f"the folder mixes two models, download or export it anew."
                    )
                tensor = file.get_slice(key)
                self.headers[key] = Header(name, tensor.get_dtype(), tuple(tensor.get_shape()))
        lost = sorted(set(weight_map or {}) - set(self.headers))
        if lost:
            raise ValueError(
                f"{INDEX} of {self.folder} names {lost[0]}{and_more(lost)}, which its file does "
                f"not hold; download or export the folder anew."
            )

    def _open_file(self, name: str) -> Any:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(
                f"{INDEX} names {name}, which {self.folder} lacks; download or export it anew."
            )
        try:
            return self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} is truncated or no safetensors file ({error}); download or export it anew."
            ) from error

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is no folder on this machine; a model of the hub is downloaded "
                f"first: huggingface_hub.snapshot_download(name) returns its folder."
            )
        if not path.is_file():
            raise ValueError(
                f"{self.folder} holds neither {SINGLE} nor {INDEX}; load_hf reads safetensors only "
                f"(an interrupted export has neither)."
            )
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            is_fit = all(isinstance(item, str) for pair in weight_map.items() for item in pair)
        except (ValueError, LookupError, TypeError, AttributeError):
            is_fit = False
        if not is_fit:
            raise ValueError(f"{path} is no index of weights; download or export it anew.")
        for name in weight_map.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{path} names {name!r}; it must name safetensors files inside the folder."
                )
        return dict(weight_map)


def and_more(names: Sequence[str]) -> str:
    """What follows the first of several names in a message."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
