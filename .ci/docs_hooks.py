"""Hooks of mkdocs: pages of docs/ may link to the rest of the repository.

A link that leaves docs/, such as ../csrc/README.md, is right where the repository is browsed. The
site gets a copy of what it leads to under repository/: Markdown as a page, whose own links are
followed likewise, everything else as a file. A link to a file that does not exist stays as it is,
and mkdocs refuses it.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COPIES = "repository"
LINK = re.compile(r"\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for match in LINK.finditer(page.content_string):
            target = _target(page, match["path"])
            if target is None or target.is_relative_to(DOCS):
                continue
            name = _site_path(target)
            if name in files.src_uris:
                continue
            copy = File.generated(
                config, name, abs_src_path=str(target), inclusion=InclusionLevel.NOT_IN_NAV
            )
            files.append(copy)
            if copy.is_documentation_page():
                waiting.append(copy)
    return files


def on_page_markdown(markdown: str, page: Page, **_kwargs: Any) -> str:
    """Turn links into or out of the copies into links of the site."""

    def rewritten(match: re.Match[str]) -> str:
        target = _target(page.file, match["path"])
        if target is None:
            return match[0]
        folder = PurePosixPath(page.file.src_uri).parent
        return f"]({os.path.relpath(_site_path(target), folder)}{match['anchor'] or ''})"

    return LINK.sub(rewritten, markdown)


def _target(page: File, path: str) -> Path | None:
    """The file of the repository that a link of a page leads to; None where there is none."""
    target = (_source(page.src_uri).parent / path).resolve()
    return target if target.is_file() and target.is_relative_to(ROOT) else None


def _source(src_uri: str) -> Path:
    name = src_uri.removeprefix(f"{COPIES}/")
    return DOCS / name if name == src_uri else ROOT / name


def _site_path(target: Path) -> str:
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"{COPIES}/{target.relative_to(ROOT).as_posix()}"
