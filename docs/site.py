"""Hook of mkdocs: links that leave docs/ lead to the repository, the start page is the README, formulas are MathML.

On the repository's pages a document links to `../benchmarks/x.png`; on the site such files do not exist. The documents
stay as they are, so that both work. Browsers draw MathML by themselves, so no script from another server is needed.
"""

from __future__ import annotations

import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)([^)]*)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_PICTURES = (".png", ".svg", ".jpg")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace each relative link that leaves docs/ by the same file's address in the repository."""
    del files
    folder = (ROOT / "docs" / page.file.src_uri).parent
    repository = str(config["repo_url"]).rstrip("/")

    def moved(found: re.Match[str]) -> str:
        mark, text, target, rest = found.groups()
        if "://" in target or target.startswith(("mailto:", "/")):
            return found.group(0)
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found.group(0)
        inside = path.relative_to(ROOT)
        kind = "raw" if mark and path.suffix in _PICTURES else "blob" if path.is_file() else "tree"
        return f"{mark}[{text}]({repository}/{kind}/main/{inside}{rest})"

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Replace each formula in TeX by MathML."""
    del page, config, files

    def drawn(found: re.Match[str]) -> str:
        return convert(unescape(found[2]), display="inline" if found[1] == "span" else "block")

    return _FORMULA.sub(drawn, html)


def on_pre_build(config: Any) -> None:
    """Make docs/index.md from the README, whose links start at the repository's root."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def from_docs(found: re.Match[str]) -> str:
        mark, words, target, rest = found.groups()
        if "://" in target:
            return found.group(0)
        inside = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
        return f"{mark}[{words}]({inside}{rest})"

    page = Path(config["docs_dir"]) / "index.md"
    new = _LINK.sub(from_docs, text)
    if not page.is_file() or page.read_text(encoding="utf-8") != new:
        page.write_text(new, encoding="utf-8")


def on_post_build(config: Any) -> None:
    """Leave nothing behind that the repository does not hold."""
    shutil.rmtree(Path(config["site_dir"]) / "__pycache__", ignore_errors=True)
