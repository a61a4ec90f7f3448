"""`examples.prepare_data`: the reference's SST-2 form, files, and going on after a kill."""

import json
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch

from examples import corpus, prepare_data
from examples.packing import ChannelWriter
from examples.text_sources import open_source

SENTENCES = [f"film number {i} is {'good' if i % 3 else 'not so good , really'}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(SENTENCES, 300)


@pytest.fixture
def sst2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> datasets.Dataset:
    """SST-2's columns in a folder of this machine, where `--source sst2` then finds it."""
    rows = {"sentence": SENTENCES, "label": [1] * 40, "idx": list(range(40))}
    folder = tmp_path / "sst2"
    folder.mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    load = datasets.load_dataset
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def load_local(name: str, config: str | None = None, *, split: str):
        assert (name, config) == ("nyu-mll/glue", "sst2")
        return load(str(folder), split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    return datasets.Dataset.from_dict(rows)


def test_sst2_is_packed_as_the_reference_launch_does(tmp_path: Path, sst2, tokenizer) -> None:
    """First tenth held out; tokenised, concatenated, cut; labels are the input ids."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    arguments = ["--output", str(out), "--block_size", "16", "--tokenizer"]
    assert prepare_data.main([*arguments, str(tmp_path / "tokenizer")]) == 0
    for name, rows in (("validation", sst2.select(range(4))), ("train", sst2.select(range(4, 40)))):
        ids = [i for row in rows for i in tokenizer(row["sentence"])["input_ids"]]
        lines = (out / name / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == len(ids) // 16
        for place, line in enumerate(lines):
            block = ids[16 * place : 16 * (place + 1)]
            assert json.loads(line) == {"input_ids": block, "labels": block}
        progress = json.loads((out / f"{name}.progress.json").read_text())
        assert progress["tokens"] == len(ids)
        assert progress["rest"] == ids[16 * len(lines) :]
    data = corpus.load(out, block_size=16)
    assert data.vocab_size == len(tokenizer)
    assert data.train.dtype == torch.int64


def test_output_says_how_many_tokens_and_blocks(tmp_path: Path, capsys) -> None:
    """The offline corpus, end-of-text between topics; called again it finds everything done."""
    arguments = ["--output", str(tmp_path), "--source", "manual", "--vocab_size", "512"]
    arguments += ["--block_size", "64"]
    assert prepare_data.main(arguments) == 0
    said = capsys.readouterr().out
    data = corpus.load(tmp_path, block_size=64)
    for name, blocks in (("train", data.train), ("validation", data.validation)):
        progress = json.loads((tmp_path / f"{name}.progress.json").read_text())
        assert progress["tokens"] == 64 * len(blocks) + len(progress["rest"])
        line = next(line for line in said.splitlines() if line.startswith(f"{name}:"))
        assert f"{progress['tokens']:,} tokens, {len(blocks):,} blocks of 64" in line
        assert (blocks == 0).any()  # end-of-text
    before = (tmp_path / "train" / "train.jsonl").stat().st_mtime_ns
    assert prepare_data.main(arguments) == 0
    assert (tmp_path / "train" / "train.jsonl").stat().st_mtime_ns == before


def test_files_give_documents_in_order(tmp_path: Path) -> None:
    """A text file's blank lines separate documents, a JSON line is one."""
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n\nthree")
    (tmp_path / "b.jsonl").write_text('{"body": "four"}\n\n{"body": "five", "x": 1}\n')
    source = open_source([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], "body")
    assert list(source.read(0, len(source))) == ["one\ntwo\n", "three", "four", "five"]
    assert list(source.read(1, 3)) == ["three", "four"]


def _writer(folder: Path, tokenizer, **settings) -> ChannelWriter:
    return ChannelWriter(
        folder, "train", tokenizer=tokenizer, block_size=8, end_of_text=True, settings=settings
    )


def test_killed_run_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of a batch; blocks behind the noted progress are cut off and redone."""
    monkeypatch.setattr("examples.packing.BATCH_DOCUMENTS", 7)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")

    def until_killed(done: int):
        for number, text in enumerate(SENTENCES[done:], done):
            if number == 25:
                os.kill(os.getpid(), signal.SIGKILL)
            yield text

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    _writer(whole, tokenizer).write(lambda done: iter(SENTENCES[done:]), 40)
    child = os.fork()
    if child == 0:
        _writer(killed, tokenizer).write(until_killed, 40)
        os._exit(0)  # not reached
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (killed / "train" / "train.jsonl").exists()
    with (killed / "train.jsonl.partial").open("a") as lines:
        lines.write('{"input_ids": [1, 2')
    skipped = []

    def read(done: int):
        skipped.append(done)
        return iter(SENTENCES[done:])

    progress = _writer(killed, tokenizer).write(read, 40)
    assert skipped == [21]
    assert progress.documents == 40
    for name in ("train/train.jsonl", "train.progress.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_other_settings_are_refused_by_name(tmp_path: Path, tokenizer) -> None:
    """A half-written channel of another text is not continued."""
    _writer(tmp_path, tokenizer, source="a").write(lambda done: iter(SENTENCES[done:]), 40)
    with pytest.raises(ValueError, match=r"begun with source='a', now it is 'b'; take another"):
        _writer(tmp_path, tokenizer, source="b")


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ('{"text": "a"}\n{"txt": 3}\n', [], "t.jsonl, line 2: a JSON object with the text under"),
        ('{"text": "a"}\n', [], "1 documents cannot be split with --validation_share 0.1"),
        ('{"text": "a"}\n' * 20, ["--block_size", "900"], "which fill no block of 900"),
        (None, [], "there is no file"),
    ],
)
def test_bad_input_says_what_is_wrong(tmp_path: Path, capsys, text, arguments, said: str) -> None:
    path = tmp_path / "t.jsonl"
    if text is not None:
        path.write_text(text)
    arguments = ["--output", str(tmp_path / "out"), "--vocab_size", "260", *arguments]
    assert prepare_data.main([*arguments, "--source", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_dataset_without_the_field_names_those_it_has(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"words": ["a"], "n": [1]}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="has the fields words, n, but no 'text'"):
        open_source([str(tmp_path / "d")], None)
    assert list(open_source([str(tmp_path / "d")], "words").read(0, 1)) == ["a"]


def test_load_of_other_blocks_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no blocks"):
        corpus.load(tmp_path)
    corpus.prepare(tmp_path, vocab_size=384, block_size=32)
    with pytest.raises(ValueError, match="blocks of 32 tokens, but --max_context_width is 16"):
        corpus.load(tmp_path, block_size=16)
