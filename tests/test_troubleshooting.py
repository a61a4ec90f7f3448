"""docs/troubleshooting.md quotes what the source says, and misses none of it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
OTHERS = ("Messages of torch, transformers and accelerate", "No message, but wrong")
HOLE = "\0"  # what a message fills in
CALL = re.compile(r"\bTORCH_CHECK(?:_VALUE)?\(")
LITERAL = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
RETURNED_IN = (
    *("parallel/checks.py", "parallel/mesh.py", "parallel/nodes.py", "parallel/peers.py"),
    *("integrations/peft.py", "_build_info.py"),
)
NOT_FOR_USERS = (
    "module \0 has no attribute \0",  # Python's own words
    "cd \0 && \0",  # a command inside of a message
    "\0.\0 \0.",  # around a message that is a constant
)
SHORT = {  # on the page, with too few words of their own to be searched for
    "\0 must be \0, got \0.": "... must be ..., got",
    "\0 is not JSON: \0": "... is not JSON",
    "the \0 failed; ": "the ... failed;",
    "z\0rows\0 must be \0 [\0, \0], got \0 ": "... must be ... [..., ...], got",
    " must be \0 [\0, \0], got \0 ": "... must be ... [..., ...], got",
}


def quotes() -> list[str]:
    """The first cells of the tables on our messages: their code spans."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        if not section.startswith(OTHERS):
            rows = re.findall(r"^\| (`.*?`) \|", section, flags=re.MULTILINE)
            found += [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    return found


def pattern(quote: str) -> re.Pattern[str]:
    """`...` stands for anything."""
    parts = [re.escape(part.strip()) for part in quote.split("...") if part.strip()]
    return re.compile(r"[\s\S]*?".join(parts))


def python_text(node: ast.expr) -> str | None:
    """The text of a string or f-string, HOLE for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)
    return None


def python_files() -> Iterator[Path]:
    for path in sorted((ROOT / "torch_moe_ep").rglob("*.py")):
        if "testing" not in path.parts:
            yield path


def raised_in_python() -> Iterator[tuple[str, str]]:
    """(where, words) of every message that is raised, or returned by the checks."""
    for path in python_files():
        name = path.relative_to(ROOT / "torch_moe_ep").as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            value = None
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                if getattr(node.exc.func, "id", "") != "NotSupportedError":
                    value = node.exc.args[0]
            elif isinstance(node, ast.Return) and name in RETURNED_IN and node.value is not None:
                value = node.value if isinstance(node.value, ast.JoinedStr) else None
            words = None if value is None else python_text(value)
            if words is not None and " " in words.replace(HOLE, ""):
                yield f"{name}:{node.lineno}", words


def call_body(text: str, start: int) -> str:
    """What stands between the parentheses of a call, `start` behind the opening one."""
    depth, place = 1, start
    while depth:
        literal = LITERAL.match(text, place)
        if literal:
            place = literal.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        place += 1
    return text[start : place - 1]


def cpp_files() -> Iterator[Path]:
    kinds = ("*.cpp", "*.cu", "*.h", "*.cuh")
    yield from sorted(path for kind in kinds for path in (ROOT / "csrc").rglob(kind))


def checked_in_cpp() -> Iterator[tuple[str, str]]:
    """(where, words) of every TORCH_CHECK; literals with HOLE between."""
    for path in cpp_files():
        text = path.read_text()
        for call in CALL.finditer(text):
            parts = LITERAL.findall(call_body(text, call.end()))
            words = HOLE.join(part.replace('\\"', '"') for part in parts)
            if " " in words:
                yield f"{path.relative_to(ROOT)}:{text[: call.start()].count(chr(10)) + 1}", words


def all_words() -> Iterator[str]:
    """Every string of the source that a message may come from."""
    examples = sorted((ROOT / "examples").rglob("*.py"))
    for path in [*python_files(), *examples]:
        for node in ast.walk(ast.parse(path.read_text())):
            words = python_text(node) if isinstance(node, ast.expr) else None
            if words:
                yield words
    yield from (words for _, words in checked_in_cpp())
    for path in cpp_files():
        yield from LITERAL.findall(path.read_text())


@pytest.fixture(scope="module")
def source() -> list[str]:
    return list(all_words())


def test_every_quoted_message_is_in_the_source(source: list[str]) -> None:
    found = quotes()
    assert len(found) > 150
    missing = [q for q in found if not any(pattern(q).search(words) for words in source)]
    assert missing == []


def test_every_message_of_the_source_is_on_the_page() -> None:
    # What fits almost everything must not stand for everything.
    specific = [quote for quote in quotes() if len(re.sub(r"\W", "", quote)) >= 10]
    patterns = [pattern(quote) for quote in specific]
    messages = [*raised_in_python(), *checked_in_cpp()]
    assert len(messages) > 150
    assert set(SHORT.values()) <= set(quotes())
    missing = [
        (where, words)
        for where, words in messages
        if words not in (*NOT_FOR_USERS, *SHORT) and not any(p.search(words) for p in patterns)
    ]
    assert missing == []


def test_links_inside_of_the_page_lead_to_its_sections() -> None:
    """As mkdocs and GitHub make anchors: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) == anchors
