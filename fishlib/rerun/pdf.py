"""The book as one PDF: every page of the built site printed by Chromium, bound behind a title page and the contents.

What a page looks like on paper is in `chapters/site/book.css`, under ``@media print``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fishlib.rerun import browser
from fishlib.rerun.render import ROOT, outdated, pages
from fishlib.rerun.run import check_writable

if TYPE_CHECKING:
    from pypdf import PdfReader, PdfWriter

FOOTER = '<div style="font-size: 8px; width: 100%; padding: 0 18mm; text-align: {side}"><span class="{what}"></span></div>'
PAPER = {"format": "A4", "print_background": True, "display_header_footer": True, "header_template": "<span></span>",
         "margin": {"top": "18mm", "bottom": "20mm", "left": "18mm", "right": "18mm"},
         "footer_template": FOOTER.format(side="left", what="title")}
# Chromium numbers the pages of one document, not of a book: numbers are printed on sheets of their own, and laid over.
NUMBERS = PAPER | {"footer_template": FOOTER.format(side="right", what="pageNumber")}

FRONT = """<!doctype html><html lang="en"><meta charset="utf-8"><style>
  body {{ font-family: Arial, sans-serif; font-size: 15px; line-height: 1.5; margin: 0 }}
  a {{ color: inherit; text-decoration: none }}
  header {{ break-after: page; padding-top: 70mm; text-align: center }}
  header h1 {{ font-size: 46px; font-weight: 500; margin: 0 }}
  header h2 {{ font-size: 23px; font-weight: 400; margin: 0 0 25mm }}
  header p {{ margin: 0 0 3mm }}
  nav h1 {{ font-size: 30px; font-weight: 500; margin: 0 0 8mm }}
  nav h2 {{ font-size: 17px; font-weight: 600; margin: 6mm 0 1mm }}
  nav a {{ break-inside: avoid; display: flex }}
  nav i {{ border-bottom: 1px dotted; flex: 1; margin: 0 2mm 0.45em }}
</style>
<header><h1>{title}</h1><h2>{subtitle}</h2>
<p>{authors}</p><p>Version {version}, {year}</p><p>{licence}</p><p><a href="{url}">{url}</a></p></header>
<nav><h1>Contents</h1>{contents}</nav></html>"""


@dataclass(frozen=True)
class Part:
    """A page of the site, printed on several sheets."""

    title: str
    address: str
    sheets: PdfReader
    caption: str = ""  # of the part of the book that begins here


def print_book(site: Path | None = None, out: Path | None = None, root: Path = ROOT,
               show: Callable[[str], None] = lambda page: None) -> Path:
    """Print the site of a book to one PDF, written whole or not at all.

    It has a title page and a table of contents, page numbers that run from the first page to the last, bookmarks, and links
    that lead to the page that is meant within the PDF.

    Parameters
    ----------
    site : folder of the built site; default `_build/html`
    out : the file; default `_build/book.pdf`
    root : folder with `_config.yml`, `_toc.yml` and `CITATION.cff`, which say what the book is called and has in it
    show : called with the name of each page before it is printed

    Raises
    ------
    ValueError
        a site that is not built, lacks a page of the contents or is older than one; no Chromium, no Playwright or no pypdf
    OSError
        `out` cannot be written; this is tried before the pages are printed
    """
    site, out = Path(site or root / "_build" / "html"), Path(out or root / "_build" / "book.pdf")
    check_writable(out.parent)
    files = [page.with_suffix(".html").as_posix() for page in pages(root)]
    if missing := [file for file in (*files, "searchindex.js") if not (site / file).is_file()]:
        raise ValueError(f"{site} lacks {missing[0]}: render the book first, `fishlib render`")
    if newer := outdated(site, root):
        more = f" and {len(newer) - 1} more" if len(newer) > 1 else ""
        raise ValueError(f"{site} is older than {newer[0]}{more}: render the book again, `fishlib render`")
    try:
        from pypdf import PdfWriter
    except ImportError as error:
        raise ValueError("pypdf is not installed: pip install 'fishlib[browser]'") from error
    about, captions, book = _about(root), _captions(root), PdfWriter()
    with browser.browser() as chromium, browser.served(site) as address:
        tab = chromium.new_context(color_scheme="light").new_page()
        tab.set_default_timeout(180_000)  # a busy machine is slow, not wrong
        parts = []
        for file in files:
            show(file)
            parts.append(_print(tab, address + file, captions.get(file, "")))
        front = _sheets(tab, _front(parts, about))
        front = _sheets(tab, _front(parts, about, before=len(front.pages)))
        _bind(book, front, parts)
        _link(book, [Part("", address, front), *parts], address)
        _number(book, _sheets(tab, '<p style="break-after: page">&nbsp;</p>' * len(book.pages), NUMBERS))
    book.add_metadata({"/Title": about["title"], "/Author": about["authors"]})
    _write(book, out)
    return out


def _about(root: Path) -> dict[str, str]:
    """What stands on the title page."""
    config, citation = (yaml.safe_load((root / name).read_text(encoding="utf-8")) for name in ("_config.yml", "CITATION.cff"))
    people = [author.get("name") or f"{author['given-names']} {author['family-names']}" for author in citation["authors"]]
    return {"title": citation["title"], "authors": ", ".join(people), "version": citation["version"],
            "year": config["copyright"], "licence": config["html"]["extra_footer"], "url": config["repository"]["url"]}


def _captions(root: Path) -> dict[str, str]:
    """The captions of the parts in `_toc.yml`, by the first page of each."""
    from sphinx_external_toc.parsing import parse_toc_yaml

    parts = parse_toc_yaml(root / "_toc.yml").root.subtrees
    return {f"{part.items[0]}.html": part.caption for part in parts if part.caption}


def _print(tab: Any, address: str, caption: str) -> Part:
    """A page of the site as PDF, with everything that is folded opened."""
    tab.goto(address, wait_until="load")
    tab.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
    tab.evaluate("""async () => {
        document.documentElement.dataset.theme = 'light';
        document.querySelectorAll('article details').forEach(part => part.open = true);
        // The PDF names only places that the page itself links to; other pages link to more.
        document.querySelectorAll('article [id]').forEach(place => {
            document.body.append(Object.assign(document.createElement('a'), {href: '#' + place.id, hidden: true}));
        });
        const pictures = [...document.images];
        pictures.forEach(picture => picture.loading = 'eager');
        await Promise.all(pictures.map(picture => picture.decode().catch(() => {})));
    }""")
    title = tab.locator("article h1").first.inner_text().rstrip("#").strip()
    return Part(title, address, _sheets(tab), caption)


def _sheets(tab: Any, html: str | None = None, paper: Mapping[str, Any] = PAPER) -> PdfReader:
    """What the tab shows, or `html`, as PDF."""
    from pypdf import PdfReader

    if html is not None:
        tab.set_content(html)
    return PdfReader(io.BytesIO(tab.pdf(**paper)))


def _front(parts: Sequence[Part], about: Mapping[str, str], before: int = 0) -> str:
    """The title page and the contents, for parts that begin after `before` pages."""
    contents, number = "", before + 1
    for part in parts:
        contents += f"<h2>{escape(part.caption)}</h2>" if part.caption else ""
        contents += f'<a href="{part.address}"><span>{escape(part.title)}</span><i></i><span>{number}</span></a>'
        number += len(part.sheets.pages)
    title, _, subtitle = about["title"].partition(": ")
    # The licence is HTML, as the site's footer has it.
    plain = {name: escape(str(text)) for name, text in about.items()} | {"licence": about["licence"]}
    return FRONT.format_map(plain | {"title": escape(title), "subtitle": escape(subtitle).capitalize(), "contents": contents})


def _bind(book: PdfWriter, front: PdfReader, parts: Sequence[Part]) -> None:
    """Put all sheets into the book, without their links, and give it bookmarks: parts, and pages of the site in them."""
    book.page_mode = "/UseOutlines"
    for sheet in front.pages:
        book.add_page(sheet, ["/Annots"])
    above = None
    for part in parts:
        start = len(book.pages)
        for sheet in part.sheets.pages:
            book.add_page(sheet, ["/Annots"])
        if part.caption:
            above = book.add_outline_item(part.caption, start)
        book.add_outline_item(part.title, start, above)


def _link(book: PdfWriter, parts: Sequence[Part], site: str) -> None:
    """Give the book the links of its parts: between pages of the site they lead to sheets, beyond the site to addresses.

    Chromium knows one page of the site at a time: in its PDF, links to others are addresses of the server, and the names of
    places are those of ids, which many pages share.
    """
    from pypdf.annotations import Link
    from pypdf.generic import Fit

    targets, links, start = {}, [], 0
    for part in parts:
        targets[part.address] = {"target_page_index": start, "fit": Fit.xyz()}
        for name, place in part.sheets.named_destinations.items():
            number = start + part.sheets.get_destination_page_number(place)
            targets[f"{part.address}#{name[1:]}"] = {"target_page_index": number, "fit": Fit.xyz(top=place.top)}
        for number, sheet in enumerate(part.sheets.pages, start):
            links += [(number, link["/Rect"], _address(link, part)) for link in _annotations(sheet)]
        start += len(part.sheets.pages)
    for number, place, address in links:
        target = targets.get(address) or targets.get(address.partition("#")[0])
        if target or not address.startswith(site):  # the site has pages that the book has not
            book.add_annotation(number, Link(rect=place, **(target or {"url": address})))


def _annotations(sheet: Any) -> list[Any]:
    return [reference.get_object() for reference in sheet.annotations or []]


def _address(link: Mapping[str, Any], part: Part) -> str:
    return f"{part.address}#{link['/Dest'][1:]}" if "/Dest" in link else link["/A"]["/URI"]


def _number(book: PdfWriter, numbers: PdfReader) -> None:
    """Lay the numbers over the pages; the title page has none."""
    for sheet, number in list(zip(book.pages, numbers.pages, strict=True))[1:]:
        sheet.merge_page(number)
        sheet.compress_content_streams()


def _write(book: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        book.write(part)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
