"""Packed text on disk, as the reference launch has it: blocks of token ids, one JSON object a line.

    OUT/train/train.jsonl             {"input_ids": [...], "labels": [...]}, block_size ids each
    OUT/validation/validation.jsonl   the same
    OUT/tokenizer/                    Hugging Face's layout

Each folder can be a channel of a training platform, which mounts them side by side again. While a
channel is being written its blocks are in OUT/<channel>.jsonl.partial and what has been done is in
OUT/<channel>.progress.json, so that a killed run goes on where it was.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

BATCH_DOCUMENTS = 1000  # tokenised together, and written before the progress is noted


@dataclass
class Progress:
    """How far a channel has come.

    Attributes:
        settings: everything that the blocks depend on; a run goes on only if it is the same.
        documents: read so far.
        tokens: in whole blocks and `rest` together.
        blocks: written.
        num_bytes: of the partial file that belong to them.
        rest: ids that do not fill a block yet; dropped at the end.
        is_done: the channel is complete and in its place.
    """

    settings: dict[str, Any]
    documents: int = 0
    tokens: int = 0
    blocks: int = 0
    num_bytes: int = 0
    rest: list[int] = field(default_factory=list)
    is_done: bool = False

    def __str__(self) -> str:
        """What people want to know."""
        size = self.settings["block_size"]
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.blocks:,} blocks of "
            f"{size:,} ({len(self.rest):,} tokens at the end fill no block and are dropped)"
        )


class ChannelWriter:
    """Packs one channel; documents come in order and each is packed once, kills or not.

    Args:
        folder: OUT.
        name: of the channel.
        tokenizer: a Hugging Face tokenizer.
        block_size: ids a block.
        end_of_text: put the tokenizer's end-of-text id after each document.
        settings: what else the blocks depend on, as JSON holds it.
        is_quiet: show no progress bar.

    Raises:
        ValueError: what lies in the folder was begun with other settings.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        tokenizer: Any,
        block_size: int,
        end_of_text: bool,
        settings: dict[str, Any],
        is_quiet: bool = False,
    ) -> None:
        self.name = name
        self.is_quiet = is_quiet
        self.tokenizer = tokenizer
        self.end = [int(tokenizer.eos_token_id)] if end_of_text else []
        self.target = folder / name / f"{name}.jsonl"
        self.partial = folder / f"{name}.jsonl.partial"
        self.progress_file = folder / f"{name}.progress.json"
        wanted = {**settings, "block_size": block_size, "end_of_text": end_of_text}
        self.progress = self._found(wanted) or Progress(wanted)
        self.block_size = block_size

    def _found(self, wanted: dict[str, Any]) -> Progress | None:
        if not self.progress_file.exists():
            return None
        found = Progress(**json.loads(self.progress_file.read_text()))
        for key in sorted({*wanted, *found.settings}):
            if wanted.get(key) != found.settings.get(key):
                raise ValueError(
                    f"{self.progress_file} was begun with {key}={found.settings.get(key)!r}, now "
                    f"it is {wanted.get(key)!r}; take another --output, or remove this one."
                )
        where = self.target if found.is_done else self.partial
        size = where.stat().st_size if where.exists() else 0
        return found if size >= found.num_bytes else None  # lost with a machine: begin anew

    def write(self, read: Callable[[int], Iterator[str]], num_documents: int) -> Progress:
        """Pack what is missing.

        Args:
            read: takes the number of documents to skip, gives those after them.
            num_documents: in all, for the progress bar.
        """
        if self.progress.is_done:
            return self.progress
        self.target.parent.mkdir(parents=True, exist_ok=True)
        documents = read(self.progress.documents)
        with (
            self.partial.open("ab") as lines,
            tqdm(
                total=num_documents,
                initial=self.progress.documents,
                desc=self.name,
                unit=" documents",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 30.0,  # a log file gets few lines
                disable=self.is_quiet,
            ) as bar,
        ):
            lines.truncate(self.progress.num_bytes)  # blocks behind it are packed again
            while batch := list(islice(documents, BATCH_DOCUMENTS)):
                lines.write(self._pack(batch))
                lines.flush()
                self.progress.num_bytes = lines.tell()
                self._note()
                bar.update(len(batch))
                bar.set_postfix_str(f"{self.progress.tokens:,} tokens", refresh=False)
        os.replace(self.partial, self.target)
        self.progress.is_done = True
        self._note()
        return self.progress

    def _pack(self, batch: list[str]) -> bytes:
        progress, size = self.progress, self.block_size
        ids = progress.rest
        num_before = len(ids)
        for document in self.tokenizer(batch, verbose=False)["input_ids"]:
            ids += document + self.end
        progress.tokens += len(ids) - num_before
        last = len(ids) - len(ids) % size
        blocks = [ids[start : start + size] for start in range(0, last, size)]
        progress.rest = ids[last:]
        progress.documents += len(batch)
        progress.blocks += len(blocks)
        lines = (json.dumps({"input_ids": block, "labels": block}) + "\n" for block in blocks)
        return "".join(lines).encode()

    def _note(self) -> None:
        beside = self.progress_file.with_suffix(".new")
        beside.write_text(json.dumps(asdict(self.progress)))
        os.replace(beside, self.progress_file)
