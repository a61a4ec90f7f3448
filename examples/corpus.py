"""Real text without a download: the reference manual that ships inside CPython.

`pydoc_data.topics` holds the language reference as plain text (about 0.47 MB). Its topics overlap
(the topic "compound" repeats "if", "while", "for", ...), so each paragraph is kept once: held-out
text would otherwise occur word for word in the training text.

The packing is the reference launch's: the first tenth is held out, everything is tokenised and
concatenated, cut into blocks of equal length, labels are the input ids; one JSON object a line.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

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


def pack(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, block_size: int
) -> list[list[int]]:
    """Tokenise, concatenate with end-of-text between, cut; the incomplete last block is dropped."""
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text)["input_ids"])
        ids.append(int(tokenizer.eos_token_id))
    last = len(ids) - len(ids) % block_size
    return [ids[start : start + block_size] for start in range(0, last, block_size)]


def prepare(folder: Path, vocab_size: int, block_size: int, held_out: float = 0.1) -> str:
    """Write tokenizer, train.jsonl and validation.jsonl into `folder`; return what was done."""
    training, validation = split(documents(), held_out)
    tokenizer = train_tokenizer(training, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    num_blocks = {}
    for name, texts in (("train", training), ("validation", validation)):
        blocks = pack(texts, tokenizer, block_size)
        num_blocks[name] = len(blocks)
        lines = (json.dumps({"input_ids": block, "labels": block}) for block in blocks)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    num_bytes = sum(len(text.encode()) for text in training + validation)
    return (
        f"corpus: {num_bytes / 1e6:.2f} MB of CPython's reference manual (each paragraph once), "
        f"byte-level BPE of {len(tokenizer)} tokens, {num_blocks['train']} training and "
        f"{num_blocks['validation']} validation blocks of {block_size} tokens"
    )


def load(folder: Path) -> Corpus:
    """Read what `prepare` wrote."""
    blocks = {}
    for name in ("train", "validation"):
        with (folder / f"{name}.jsonl").open() as lines:
            blocks[name] = torch.tensor([json.loads(line)["input_ids"] for line in lines])
    vocab_size = len(PreTrainedTokenizerFast.from_pretrained(folder))
    return Corpus(blocks["train"], blocks["validation"], vocab_size)


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
