"""A hook of MkDocs: links of a page to files of the repository, which are no pages of the site.

They lead to the repository where ``repo_url`` names one; otherwise the file is named in the text. A file that does not
exist is a warning, which ``mkdocs build --strict`` does not pass.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]\[]+)\]\((\.\./[^)\s]+)\)")
logger = logging.getLogger("mkdocs.hooks.docs_links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """What MkDocs calls with a page's text before it is rendered."""
    folder = posixpath.dirname(page.file.src_uri)
    root = Path(config.docs_dir).parent

    def rewritten(link: re.Match[str]) -> str:
        text, (path, _, anchor) = link[1], link[2].partition("#")
        path = posixpath.normpath(posixpath.join("docs", folder, path))
        if not (root / path).exists():
            logger.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{'#' + anchor if anchor else ''})"
        return text if text.strip("`") in path else f"{text} (`{path}`)"

    return LINK.sub(rewritten, markdown)
