"""Real text without a download: the reference manual that ships inside CPython.

`pydoc_data.topics` holds the language reference as plain text (about 0.47 MB). Its topics overlap
(the topic "compound" repeats "if", "while", "for", ...), so each paragraph is kept once: held-out
text would otherwise occur word for word in the training text.

`prepare` packs it as `examples.prepare_data` packs any text, `load` reads what either wrote.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.packing import ChannelWriter

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Packed text: int64 blocks of token ids [blocks, block_size], validation and training."""

    train: torch.Tensor
    validation: torch.Tensor
    vocab_size: int

    def unigram_cross_entropy(self) -> float:
        """Nats a token that knowing only the training text's token frequencies costs.

        Taken over the tokens that a model predicts in the validation blocks (each block's first
        token is given, not predicted). Every count has one added, so that no token is impossible.
        """
        counts = torch.bincount(self.train.flatten(), minlength=self.vocab_size) + 1
        log_probability = torch.log(counts.double() / counts.sum())
        return float(-log_probability[self.validation[:, 1:]].mean())


def documents() -> list[str]:
    """Return the topics of CPython's manual in alphabetical order, no paragraph twice."""
    seen: set[str] = set()
    kept_documents = []
    for name in sorted(topics.topics):
        kept = []
        for paragraph in topics.topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            kept_documents.append("\n\n".join(kept))
    return kept_documents


def split(texts: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """Split into (training, validation): validation is the first `held_out` of the characters."""
    wanted = held_out * sum(map(len, texts))
    length = 0
    for num_validation, text in enumerate(texts):
        if length >= wanted:
            return texts[num_validation:], texts[:num_validation]
        length += len(text)
    raise ValueError(f"held_out must be below 1 and leave training text, got {held_out}.")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; deterministic, about a second."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )


def prepare(folder: Path, vocab_size: int, block_size: int, held_out: float = 0.1) -> str:
    """Write train/, validation/ and tokenizer/ into `folder`; return what was done."""
    training, validation = split(documents(), held_out)
    tokenizer = train_tokenizer(training, vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    num_blocks = {}
    for name, texts in (("train", training), ("validation", validation)):
        (folder / f"{name}.progress.json").unlink(missing_ok=True)  # takes a second: done anew
        writer = ChannelWriter(
            folder,
            name,
            tokenizer=tokenizer,
            block_size=block_size,
            end_of_text=True,
            settings={"source": "manual"},
            is_quiet=True,
        )
        num_blocks[name] = writer.write(lambda done: iter(texts[done:]), len(texts)).blocks  # noqa: B023
    num_bytes = sum(len(text.encode()) for text in training + validation)
    return (
        f"corpus: {num_bytes / 1e6:.2f} MB of CPython's reference manual (each paragraph once), "
        f"byte-level BPE of {len(tokenizer)} tokens, {num_blocks['train']} training and "
        f"{num_blocks['validation']} validation blocks of {block_size} tokens"
    )


def load(folder: Path, block_size: int | None = None) -> Corpus:
    """Read packed text (`examples.packing` has the layout).

    Args:
        folder: with train/, validation/ and tokenizer/.
        block_size: tokens that a block must have; None takes any.

    Raises:
        ValueError: a part is missing, or blocks have another length.
    """
    blocks = {name: _read_blocks(folder / name, block_size) for name in ("train", "validation")}
    if not (folder / "tokenizer").is_dir():
        raise ValueError(
            f"{folder} has no tokenizer/; make it with python -m examples.prepare_data."
        )
    vocab_size = len(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    return Corpus(blocks["train"], blocks["validation"], vocab_size)


def _read_blocks(channel: Path, block_size: int | None) -> torch.Tensor:
    """All blocks of the .jsonl files of one channel: int64 [blocks, block_size]."""
    rows = []
    for path in sorted(channel.glob("*.jsonl")):
        with path.open() as lines:
            rows += [torch.tensor(json.loads(line)["input_ids"]) for line in lines]
    if not rows:
        raise ValueError(
            f"{channel} holds no blocks (*.jsonl); make them with python -m examples.prepare_data."
        )
    length = len(rows[0])
    if block_size is not None and length != block_size:
        raise ValueError(
            f"{channel} holds blocks of {length} tokens, but --max_context_width is {block_size}; "
            f"pass --max_context_width {length}, or pack anew with --block_size {block_size}."
        )
    return torch.stack(rows)


def batch_of_step(
    blocks: torch.Tensor, step: int, batch_size: int, rank: int, num_ranks: int, seed: int
) -> torch.Tensor:
    """Return the blocks that `rank` trains on in `step`: a function of its arguments alone.

    Epochs follow each other without a gap, each in its own random order. With 10 blocks, 2 ranks
    and batch 3, step 1 takes places 6..11 of the stream: rank 0 places 6, 7, 8 of epoch 0, rank 1
    place 9 of epoch 0 and places 0, 1 of epoch 1. Expert-parallel ranks are data-parallel ranks:
    each has blocks of its own.
    """
    first = (step * num_ranks + rank) * batch_size
    orders: dict[int, torch.Tensor] = {}
    ids = []
    for place in range(first, first + batch_size):
        epoch, place_in_epoch = divmod(place, len(blocks))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(len(blocks), generator=generator)
        ids.append(int(orders[epoch][place_in_epoch]))
    return blocks[ids]
