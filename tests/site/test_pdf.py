"""The printed book: pages in order under their titles, formulas set, folded parts open, a file that is whole or absent."""

import errno
import os

import pytest

from fishlib.rerun import browser, pdf

pypdf = pytest.importorskip("pypdf", reason="no pypdf: pip install 'fishlib[browser]'")
needs_browser = pytest.mark.skipif(browser.find() is None, reason=f"no browser: none of {', '.join(browser.NAMES)}")

PAGE = "<title>{title}</title><article><h1>{title}</h1><details><summary>S</summary>hidden {title}</details></article>"


@pytest.fixture
def book(tmp_path):
    """The contents of two pages, and their site."""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: chapters/first\nchapters:\n- file: chapters/second\n")
    site = tmp_path / "_build" / "html" / "chapters"
    site.mkdir(parents=True)
    for name in ("first", "second"):
        (tmp_path / "chapters" / f"{name}.md").write_text("")
        (site / f"{name}.html").write_text(PAGE.format(title=f"Das {name}"))
    return tmp_path


@needs_browser
def test_book_is_printed_in_order_with_bookmarks_and_what_was_folded(book):
    pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'fishlib[browser]'")
    printed = pypdf.PdfReader(pdf.print_book(root=book))
    assert [item.title for item in printed.outline] == ["Das first", "Das second"]
    text = [page.extract_text() for page in printed.pages]
    assert "hidden Das first" in text[0]
    assert "hidden Das second" in text[1]


def test_page_that_was_not_rendered_is_named(book):
    (book / "_build" / "html" / "chapters" / "second.html").unlink()
    with pytest.raises(ValueError, match=r"lacks chapters/second\.html: render the book first"):
        pdf.print_book(root=book)


def test_without_a_browser_the_message_says_what_to_install(book, monkeypatch):
    monkeypatch.setattr(browser, "find", lambda: None)
    with pytest.raises(ValueError, match="install Chromium"):
        pdf.print_book(root=book)


def test_full_disk_leaves_the_former_file(tmp_path, monkeypatch):
    out = tmp_path / "book.pdf"
    out.write_bytes(b"former")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="space"):
        pdf._write(pypdf.PdfWriter(), out)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"book.pdf": b"former"}
