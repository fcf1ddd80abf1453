"""Sphinx extension: corrects what the writer of pages gets wrong.

It marks a list of references as a list of entries by ARIA roles that are withdrawn or stand at the wrong element, so that
whoever has a page read aloud is told of a list with nothing in it. Plain text is the better page. And it sets all that a run
gives to the text in bold, which suits numbers, but not whole sentences.
"""

from __future__ import annotations

import re

LONG = 40  # characters from which a text is a sentence


def corrected(body: str) -> str:
    """The page's HTML without the roles of the lists of references, and with a class for the sentences that a run wrote."""
    body = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    body = re.sub(rf'<span class="pasted-text">(?=[^<]{{{LONG}}})', '<span class="pasted-text sentence">', body)
    return re.sub(r'(<div class="citation"[^>]*?) role="doc-biblioentry"', r"\1", body)


def setup(app: object) -> dict[str, bool]:
    def correct(app: object, name: str, template: str, context: dict, tree: object) -> None:
        if "body" in context:
            context["body"] = corrected(context["body"])

    app.connect("html-page-context", correct)
    return {"parallel_read_safe": True}
