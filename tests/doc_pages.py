"""Code blocks of Markdown pages, and how they are run.

A fence says what it holds: python, bash, json, yaml, console for commands behind `$` and what they
print, or text for what is no code. Comments that a reader does not see say the rest, as words and,
on the lines below, Python that runs in that place:

    <!-- test: ranks=2 "cuda"=>"cpu"
    model = tiny_mixtral()
    -->

    ranks=N      the page's Python runs on N ranks over gloo; 1 if nothing is said
    torchrun     the page makes its process group itself, in the environment that torchrun sets
    OLD=>NEW     in the blocks of the page from here on, for what a test machine has not
    gpu          the next block needs a GPU: its syntax is checked
    cluster      the next block needs several machines, or a service: likewise
    by=PATH      the next block is run by that file, which must name what it starts; what a console
                 prints is for that file to compare

The Python of a page runs from top to bottom in one namespace, so that a block may use what one
before it made; then its shell blocks, in the same empty folder.
"""

import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
import yaml

ROOT = Path(__file__).resolve().parent.parent
PIECE = re.compile(
    r"^<!-- test:(?P<words>[^\n]*?)(?:\n(?P<setup>.*?))?-->"
    r"|^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
LANGUAGES = ("python", "bash", "console", "json", "yaml", "text")
NEEDS = ("gpu", "cluster")


@dataclass
class Block:
    """A piece of code of a page and the line where it begins."""

    language: str
    code: str
    line: int
    needs: str = ""
    run_by: str = ""

    @property
    def commands(self) -> str:
        """What a shell is to run of it."""
        if self.language != "console":
            return self.code
        lines = [line[2:] for line in self.code.splitlines() if line.startswith("$ ")]
        return "\n".join(lines)


@dataclass
class Page:
    """What a page holds; `problems` are sentences on what this file does not understand."""

    path: Path
    ranks: int = 1
    makes_group: bool = False
    replacements: dict[str, str] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def runnable(self, language: str) -> list[Block]:
        return [b for b in self.blocks if b.language == language and not (b.needs or b.run_by)]


def read_page(path: Path) -> Page:
    """Find a page's blocks, with the replacements made."""
    page, text, about_next = Page(path), path.read_text(), {}
    for match in PIECE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        if match["words"] is None:
            _add_block(page, match, line, about_next)
            about_next = {}
            continue
        about_next |= _read_words(page, match["words"], line)
        if match["setup"]:
            page.blocks.append(Block("python", match["setup"], line))
    return page


def _add_block(page: Page, match: re.Match[str], line: int, about: dict[str, str]) -> None:
    code, language = match["body"], match["language"].strip()
    for old, new in page.replacements.items():
        code = code.replace(old, new)
    where = f"{page.name}:{line - 1}"
    if language not in LANGUAGES:
        wanted = ", ".join(LANGUAGES)
        page.problems.append(f"{where}: a fence must say one of {wanted}, got {language!r}")
    if language == "console" and not about:
        page.problems.append(f"{where}: a console needs by=, gpu or cluster")
    page.blocks.append(Block(language, code, line, **about))


def _read_words(page: Page, words: str, line: int) -> dict[str, str]:
    """What the words say of the page, and return what they say of the next block."""
    about = {}
    for word in words.split():
        if word in NEEDS:
            about["needs"] = word
        elif word.startswith("by="):
            about["run_by"] = word.removeprefix("by=")
        elif word == "torchrun":
            page.makes_group = True
        elif "=>" in word:
            page.replacements.update([word.split("=>")])
        elif word.startswith("ranks="):
            page.ranks = int(word.removeprefix("ranks="))
        else:
            page.problems.append(f"{page.name}:{line - 1}: no such word: {word}")
    return about


def syntax_problem(block: Block) -> str | None:
    """What is wrong with a block that is not run, or not by Python."""
    try:
        if block.language == "python":
            compile(block.code, "block", "exec")
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "yaml":
            yaml.safe_load(block.code)
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        return str(error)
    if block.language not in ("bash", "console"):
        return None
    done = subprocess.run(
        ["bash", "-n"], input=block.commands, capture_output=True, text=True, check=False
    )
    return done.stderr or None


def commands_not_in(block: Block) -> list[str]:
    """Commands of a shell block that the file named by ``by=`` does not start."""
    text = (ROOT / block.run_by).read_text()
    lines = block.commands.splitlines()
    return [started for line in lines if (started := _started(line)) not in text]


def _started(line: str) -> str:
    """What a command line starts: ``make TARGET``, a module, a file of the repository; else it."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[:1] == ["make"]:
        return " ".join(words[:2])
    if "-m" in words:
        return words[words.index("-m") + 1]
    files = [word for word in words if "/" in word and (ROOT / word).is_file()]
    return files[0] if files else " ".join(words)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_python(name: str, chunks: list[tuple[int, str]], folder: str, port: int) -> None:
    """Run pieces of a page, each with the line where it begins, in one namespace; on every rank.

    With a port the ranks have no process group, but what torchrun tells them.
    """
    home = Path.cwd()
    os.chdir(folder)
    if port:
        dist.barrier()  # nobody leaves while another still connects
        dist.destroy_process_group()
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    namespace = {"__name__": "__page__"}
    try:
        for line, code in chunks:  # empty lines in front: an error names the page's own line
            exec(compile("\n" * (line - 1) + code, str(ROOT / name), "exec"), namespace)
    finally:
        os.chdir(home)


def is_of_modules(block: Block) -> bool:
    """Whether every line of a shell block is ``python -m MODULE ...``."""
    return all(line.startswith("python -m ") for line in block.code.splitlines())


def run_modules(code: str, folder: str) -> None:
    """Run lines ``python -m MODULE ...`` in this process, which has done the long imports."""
    os.chdir(folder)
    for line in code.splitlines():
        sys.argv = shlex.split(line, comments=True)[2:]
        try:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        except SystemExit as error:
            if error.code:
                raise RuntimeError(f"`{line}` ended with status {error.code}") from error


def run_shell(block: Block, folder: Path) -> subprocess.CompletedProcess:
    """Run a shell block where the page's Python ran."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
