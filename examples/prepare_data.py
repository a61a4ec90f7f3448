"""Tokenise and pack text for the training scripts: GLUE's SST-2, your own files, or the manual.

    python -m examples.prepare_data --output data/sst2 --source sst2 --tokenizer NAME_OR_FOLDER
    python -m examples.prepare_data --output data/own --source a.txt b.jsonl --block_size 512
    python -m examples.prepare_data --output data/manual --source manual --block_size 256

SST-2 comes out as in the reference launch: the first tenth of its training records is validation,
sentences are tokenised and concatenated, blocks of 2048, labels are the input ids, JSON lines. The
reference drops what is left over of every 1,000 sentences, here it is what is left over of all.
Killed and called again, it goes on where it was. `examples.packing` has the layout.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from examples import corpus
from examples.packing import ChannelWriter
from examples.text_sources import Source, open_source


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder; gets train/, validation/, tokenizer/")
    add("--source", nargs="+", default=["sst2"], help="sst2 (default), manual, hub:NAME[:CONFIG], "
        "the folder of a dataset, or text and JSON-lines files")  # fmt: skip
    add("--text_field", help='of records: by default "sentence" of SST-2, else "text"')
    add("--tokenizer", help="name or folder; by default a byte-level BPE is trained on the text")
    add("--vocab_size", type=int, default=2048, help="of that BPE (default: 2048)")
    add("--block_size", type=int, default=2048, help="tokens a block (default: 2048)")
    add(
        "--validation_share",
        type=float,
        default=0.1,
        help="of the documents, the first ones (default: 0.1)",
    )
    add("--end_of_text", type=int, choices=(0, 1), help="put the end-of-text token after each "
        "document: by default 0 for sst2, else 1")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.block_size < 2:
        parser.error(f"--block_size must be at least 2, got {arguments.block_size}.")
    if not 0.0 < arguments.validation_share < 1.0:
        parser.error(
            f"--validation_share must be between 0 and 1, got {arguments.validation_share}"
        )
    return arguments


def get_tokenizer(arguments: argparse.Namespace, source: Source, num_held_out: int) -> Any:
    """The tokenizer that was asked for or that a killed run left; else train one. Saves it."""
    folder = arguments.output / "tokenizer"
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    else:
        print(f"training a byte-level BPE of {arguments.vocab_size} tokens", flush=True)
        texts = source.read(num_held_out, len(source))
        tokenizer = corpus.train_tokenizer(texts, arguments.vocab_size)
    tokenizer.save_pretrained(folder)
    return tokenizer


def prepare(arguments: argparse.Namespace) -> None:
    """Pack both channels, saying how much there is.

    Raises:
        ValueError: no such source, too little text, or another run's output.
    """
    source = open_source(arguments.source, arguments.text_field)
    num_documents = len(source)
    num_held_out = source.num_held_out(arguments.validation_share)
    if not 0 < num_held_out < num_documents:
        raise ValueError(
            f"{num_documents} documents cannot be split with --validation_share "
            f"{arguments.validation_share}: one side would be empty."
        )
    end_of_text = arguments.end_of_text
    if end_of_text is None:
        end_of_text = arguments.source != ["sst2"]
    tokenizer = get_tokenizer(arguments, source, num_held_out)
    for name, start, end in (
        ("validation", 0, num_held_out),
        ("train", num_held_out, num_documents),
    ):
        writer = ChannelWriter(
            arguments.output,
            name,
            tokenizer=tokenizer,
            block_size=arguments.block_size,
            end_of_text=bool(end_of_text),
            settings={
                **source.identity(),
                "documents": [start, end],
                "tokenizer": arguments.tokenizer or arguments.vocab_size,
            },
        )
        progress = writer.write(lambda done: source.read(start + done, end), end - start)  # noqa: B023
        if progress.blocks == 0:
            raise ValueError(
                f"{name} has {progress.tokens} tokens, which fill no block of "
                f"{arguments.block_size}; take a smaller --block_size or more text."
            )
        print(f"{name}: {progress}", flush=True)
    print(f"in {arguments.output}/: train/, validation/, tokenizer/ ({len(tokenizer):,} tokens)")


def main(argv: list[str] | None = None) -> int:
    """Prepare, or say what is wrong."""
    try:
        prepare(parse_arguments(argv))
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
