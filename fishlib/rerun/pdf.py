"""The book as one PDF: every page of the built site printed by Chromium, in order, and put together.

What a page looks like on paper is in `chapters/site/book.css`, under ``@media print``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fishlib.rerun import browser
from fishlib.rerun.render import ROOT, pages

PAPER = {"format": "A4", "print_background": True, "display_header_footer": True, "header_template": "<span></span>",
         "margin": {"top": "18mm", "bottom": "20mm", "left": "18mm", "right": "18mm"},
         "footer_template": '<div style="font-size: 8px; width: 100%; padding: 0 18mm; display: flex; '
                            'justify-content: space-between"><span class="title"></span><span class="pageNumber"></span></div>'}


def print_book(site: Path | None = None, out: Path | None = None, root: Path = ROOT,
               show: Callable[[str], None] = lambda page: None) -> Path:
    """Print the site of a book to one PDF with bookmarks, written whole or not at all.

    Parameters
    ----------
    site : folder of the built site; default `_build/html`
    out : the file; default `_build/book.pdf`
    show : called with the name of each page before it is printed

    Raises
    ------
    ValueError
        a site that is not built or lacks a page of the contents; no Chromium, no Playwright or no pypdf
    """
    site, out = Path(site or root / "_build" / "html"), Path(out or root / "_build" / "book.pdf")
    files = [page.with_suffix(".html").as_posix() for page in pages(root)]
    if missing := [file for file in files if not (site / file).is_file()]:
        raise ValueError(f"{site} lacks {missing[0]}: render the book first, `fishlib render`")
    try:
        from pypdf import PdfWriter
    except ImportError as error:
        raise ValueError("pypdf is not installed: pip install 'fishlib[browser]'") from error
    book = PdfWriter()
    with browser.browser() as chromium, browser.served(site) as address:
        tab = chromium.new_context(color_scheme="light").new_page()
        tab.set_default_timeout(180_000)  # a busy machine is slow, not wrong
        for file in files:
            show(file)
            title, printed = _print(tab, address + file)
            book.append(io.BytesIO(printed), outline_item=title, import_outline=False)
    _write(book, out)
    return out


def _print(tab: Any, address: str) -> tuple[str, bytes]:
    """The title of a page, and the page as PDF with everything that is folded opened."""
    tab.goto(address, wait_until="load")
    tab.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
    tab.evaluate("""async () => {
        document.documentElement.dataset.theme = 'light';
        document.querySelectorAll('article details').forEach(part => part.open = true);
        const pictures = [...document.images];
        pictures.forEach(picture => picture.loading = 'eager');
        await Promise.all(pictures.map(picture => picture.decode().catch(() => {})));
    }""")
    return tab.locator("article h1").first.inner_text().rstrip("#").strip(), tab.pdf(**PAPER)


def _write(book: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        book.write(part)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
