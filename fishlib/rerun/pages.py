"""Sphinx extension: corrects what the writer of pages gets wrong for those who have a page read aloud.

It marks a list of references as a list of entries by ARIA roles that are withdrawn or stand at the wrong element, so that a
reader is told of a list with nothing in it. Plain text is the better page.
"""

from __future__ import annotations

import re


def corrected(body: str) -> str:
    """The page's HTML without the roles of the lists of references."""
    body = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    return re.sub(r'(<div class="citation"[^>]*?) role="doc-biblioentry"', r"\1", body)


def setup(app: object) -> dict[str, bool]:
    def correct(app: object, name: str, template: str, context: dict, tree: object) -> None:
        if "body" in context:
            context["body"] = corrected(context["body"])

    app.connect("html-page-context", correct)
    return {"parallel_read_safe": True}
