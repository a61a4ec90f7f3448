"""Where text comes from: a `datasets` dataset, text and JSON-lines files, or CPython's manual."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from examples import corpus

SST2 = "hub:nyu-mll/glue:sst2"  # GLUE's SST-2: `sentence` of its 67,349 training records


class Source(Protocol):
    """Documents in a fixed order."""

    def __len__(self) -> int:
        """Number of documents."""

    def read(self, start: int, end: int) -> Iterator[str]:
        """The documents from `start` to before `end`."""

    def num_held_out(self, share: float) -> int:
        """How many documents at the beginning are validation."""

    def identity(self) -> dict[str, Any]:
        """What says that another run reads the same documents."""


@dataclass(frozen=True)
class Files:
    """Text files, where blank lines separate documents, and JSON lines, a document each."""

    paths: tuple[Path, ...]
    text_field: str

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        for path in self.paths:
            if not path.is_file():
                raise ValueError(f"there is no file {path}.")

    def __len__(self) -> int:
        """Reads everything once."""
        return sum(1 for _ in self._documents())

    def read(self, start: int, end: int) -> Iterator[str]:
        """Skips by reading."""
        return islice(self._documents(), start, end)

    def num_held_out(self, share: float) -> int:
        """The first `share` of the documents."""
        return round(share * len(self))

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the files."""
        stats = [(str(path.resolve()), path.stat()) for path in self.paths]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return {"files": files, "text_field": self.text_field}

    def _documents(self) -> Iterator[str]:
        for path in self.paths:
            is_json = path.suffix in (".jsonl", ".json", ".ndjson")
            yield from self._json_lines(path) if is_json else _paragraphs(path)

    def _json_lines(self, path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.text_field]
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise ValueError(
                        f"{path}, line {number}: a JSON object with the text under "
                        f'"{self.text_field}" is wanted ({type(error).__name__}: {error}); '
                        f"--text_field names another field."
                    ) from error
                if text:
                    yield str(text)


@dataclass(frozen=True)
class Dataset:
    """A dataset of the package `datasets`, of its hub or of a folder on this machine."""

    name: str
    rows: Any
    text_field: str

    def __len__(self) -> int:
        """Number of records."""
        return len(self.rows)

    def read(self, start: int, end: int) -> Iterator[str]:
        """A record each."""
        return (str(row[self.text_field]) for row in self.rows.select(range(start, end)))

    def num_held_out(self, share: float) -> int:
        """The first `share` of the records; a slice "train[:10%]" of `datasets` rounds likewise."""
        return round(share * len(self))

    def identity(self) -> dict[str, Any]:
        """Name, fingerprint of the contents, field."""
        return {
            "dataset": self.name,
            "fingerprint": self.rows._fingerprint,
            "text_field": self.text_field,
        }


class Manual:
    """CPython's reference manual: no download."""

    def __init__(self) -> None:
        self.documents = corpus.documents()

    def __len__(self) -> int:
        """Number of topics."""
        return len(self.documents)

    def read(self, start: int, end: int) -> Iterator[str]:
        """A topic each."""
        return iter(self.documents[start:end])

    def num_held_out(self, share: float) -> int:
        """The first `share` of the characters: topics differ much in length."""
        return len(corpus.split(self.documents, share)[1])

    def identity(self) -> dict[str, Any]:
        """The manual differs between releases of CPython."""
        return {"manual": sum(map(len, self.documents))}


def open_source(words: Sequence[str], text_field: str | None) -> Source:
    """Open what --source names.

    Args:
        words: "sst2", "manual", "hub:NAME[:CONFIG]", a folder of a dataset, or files.
        text_field: the field that holds the text; None: "sentence" of SST-2, else "text".

    Raises:
        ValueError: nothing of that kind.
    """
    first = words[0]
    if len(words) == 1 and first == "manual":
        return Manual()
    if len(words) == 1 and (first == "sst2" or first.startswith("hub:") or Path(first).is_dir()):
        name = SST2 if first == "sst2" else first
        return _dataset(name, text_field or ("sentence" if name == SST2 else "text"))
    return Files(tuple(map(Path, words)), text_field or "text")


def _dataset(name: str, text_field: str) -> Dataset:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name} needs the package datasets: pip install datasets.") from error
    folder = Path(name)
    if name.startswith("hub:"):
        rows = datasets.load_dataset(*name.removeprefix("hub:").split(":"), split="train")
    elif (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        rows = datasets.load_from_disk(name)
        rows = rows["train"] if isinstance(rows, datasets.DatasetDict) else rows
    else:
        rows = datasets.load_dataset(name, split="train")
    if text_field not in rows.column_names:
        raise ValueError(
            f"{name} has the fields {', '.join(rows.column_names)}, but no {text_field!r}; "
            f"name the one with the text by --text_field."
        )
    return Dataset(name, rows, text_field)


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with path.open(encoding="utf-8") as text:
        for line in text:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
    if lines:
        yield "".join(lines)
