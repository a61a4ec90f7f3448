"""README and docs: every code block runs, every link leads somewhere, what is generated is current.

`tests/doc_pages.py` says how a page marks its blocks.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import doc_pages
import pytest
from doc_pages import ROOT, Page, read_page

import torch_moe_ep
from torch_moe_ep.integrations import smp
from torch_moe_ep.testing import RankPool

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [read_page(path) for path in PATHS]


def named(pages: list[Page]) -> list:
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.mark.parametrize("page", named(PAGES))
def test_page_says_what_each_block_is_and_each_block_parses(page: Page):
    assert page.problems == []
    for block in page.blocks:
        problem = doc_pages.syntax_problem(block)
        assert problem is None, f"{page.name}:{block.line}: {problem}"
        if block.run_by:
            missing = doc_pages.commands_not_in(block)
            assert not missing, f"{page.name}:{block.line}: {block.run_by} does not run {missing}"


@pytest.mark.parametrize(
    "page", named([page for page in PAGES if page.runnable("python") or page.runnable("bash")])
)
def test_blocks_of_page_run_from_top_to_bottom(page: Page, tmp_path: Path):
    chunks = [(block.line, block.code) for block in page.runnable("python")]
    if chunks:
        with RankPool(page.ranks) as pool:
            port = doc_pages.free_port() if page.makes_group else 0
            pool.run(doc_pages.run_python, page.name, chunks, str(tmp_path), port)
    for block in page.runnable("bash"):
        if doc_pages.is_of_modules(block):
            with RankPool(1) as pool:
                pool.run(doc_pages.run_modules, block.code, str(tmp_path))
            continue
        done = doc_pages.run_shell(block, tmp_path)
        assert done.returncode == 0, f"{page.name}:{block.line}\n{done.stdout}{done.stderr}"


def test_page_with_unknown_words_or_bare_fences_is_told_so(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(doc_pages, "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text('<!-- test: rnaks=2 -->\n```\nmake\n```\n```python\nf("cuda"\n```\n')
    page = read_page(path)
    assert [problem.split(": ")[0] for problem in page.problems] == ["page.md:1", "page.md:2"]
    assert "never closed" in doc_pages.syntax_problem(page.blocks[1])


def build_site(root: Path, folder: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("mkdocs", reason="mkdocs is installed for Python 3.11 and newer")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_site_builds_strictly_and_its_reference_holds_every_public_name(tmp_path: Path):
    done = build_site(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    inventory = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    wanted = {f"torch_moe_ep.{name}" for name in torch_moe_ep.__all__}
    modules = (torch_moe_ep.ops, torch_moe_ep.hooks, torch_moe_ep.memory, torch_moe_ep.metrics)
    for module in (*modules, smp):
        members = [getattr(module, name) for name in module.__all__]
        wanted |= {f"{m.__module__}.{m.__qualname__}" for m in members if callable(m)}
    assert wanted <= documented, sorted(wanted - documented)


def test_site_refuses_links_out_of_docs_that_lead_nowhere(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "docs_hooks.py", tmp_path / ".ci")
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: a site\nhooks: [.ci/docs_hooks.py]\nnav: [index.md, repository/README.md]\n"
    )
    (tmp_path / "docs" / "index.md").write_text("[is there](../README.md) [is not](../gone.h)\n")
    (tmp_path / "README.md").write_text("[is there](docs/index.md) [is not](docs/other.md)\n")
    done = build_site(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    refused = re.findall(r"Doc file '(.*?)' contains a link '(.*?)'", done.stderr)
    assert refused == [("index.md", "../gone.h"), ("repository/README.md", "docs/other.md")]


@pytest.mark.parametrize("room", sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()))
def test_page_of_each_room_of_csrc_names_every_file(room: str):
    """As ``name.h``, ``name.*``, or ``_cpu`` beside ``name.h``; and none that is gone."""
    text = (ROOT / "docs" / "internals" / f"{room}.md").read_text()
    paths = [path for path in (ROOT / "csrc" / room).rglob("*") if path.is_file()]
    assert paths
    missing = [path.name for path in paths if not is_named(path, text)]
    assert missing == []
    words = set(re.findall(r"`(\w+\.(?:h|cpp|cu|cuh))`", text))
    assert words <= {path.name for path in paths}


def is_named(path: Path, text: str) -> bool:
    stem, _, suffix = path.stem.rpartition("_")
    has_family = f"`{stem}.h`" in text and f"`_{suffix}`" in text
    return f"`{path.name}`" in text or f"`{path.stem}.*`" in text or has_family


def test_pictures_are_those_that_the_script_draws():
    pictures = ROOT / "docs" / "images"
    draw = runpy.run_path(str(pictures / "draw.py"))
    for name, grid in draw["GRIDS"].items():
        assert draw["draw"](*grid) == (pictures / name).read_text(), name
