"""The printed book: title, contents, pages in order under running numbers, links that hold, a file that is whole or absent."""

import errno
import os
import re

import pytest
import yaml
from click.testing import CliRunner

import fishlib
from fishlib.rerun import browser, cli, pdf

pypdf = pytest.importorskip("pypdf", reason="no pypdf: pip install 'fishlib[browser]'")
needs_browser = pytest.mark.skipif(browser.find() is None, reason=f"no browser: none of {', '.join(browser.NAMES)}")

# Two sheets a page, and the same ids on each page, as Sphinx gives them.
PAGE = """<title>{title}</title><article><h1>{title}</h1>
<a href="#id1">here</a> <a href="{other}.html#id1">there</a> <a href="{other}.html">other</a>
<a href="../genindex.html">index</a> <a href="https://example.org/">outside</a>
<details style="break-after: page"><summary>S</summary>hidden {title}</details><p id="id1">end of {title}</p></article>"""
CITATION = {"title": "Fish & chips: an introduction", "version": "1.2",
            "authors": [{"given-names": "Ada", "family-names": "Bream"}, {"name": "The cooks"}]}
CONFIG = {"copyright": "2031", "html": {"extra_footer": "Text: <a href='https://example.org/by'>CC BY</a>."},
          "repository": {"url": "https://example.org/book"}}
TOC = {"format": "jb-book", "root": "chapters/first", "parts": [
    {"caption": "More", "chapters": [{"file": "chapters/second"}, {"file": "chapters/third"}]}]}
OTHER = {"first": "second", "second": "first", "third": "first"}


@pytest.fixture
def book(tmp_path):
    """The contents of three pages, and their site, in a folder with spaces and letters of several alphabets."""
    tmp_path = tmp_path / "mein Büchlein 書"
    tmp_path.mkdir()
    (tmp_path / "chapters").mkdir()
    for name, content in {"_toc.yml": TOC, "_config.yml": CONFIG, "CITATION.cff": CITATION}.items():
        (tmp_path / name).write_text(yaml.safe_dump(content, sort_keys=False))
    site = tmp_path / "_build" / "html" / "chapters"
    site.mkdir(parents=True)
    for name, other in OTHER.items():
        (tmp_path / "chapters" / f"{name}.md").write_text("")
        (site / f"{name}.html").write_text(PAGE.format(title=f"Das {name}", other=other))
    (site.parent / "searchindex.js").write_text("")
    return tmp_path


@pytest.fixture
def printed(book):
    pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'fishlib[browser]'")
    return pypdf.PdfReader(pdf.print_book(root=book))


@needs_browser
def test_book_has_a_title_page_and_contents_with_page_numbers(printed):
    title, contents = (page.extract_text() for page in printed.pages[:2])
    lines = ["Fish & chips", "An introduction", "Ada Bream, The cooks", "Version 1.2, 2031", "Text: CC BY.",
             "https://example.org/book"]
    assert title.split("\n") == lines
    assert re.findall(r"(Das \w+)\s+(\d)", contents) == [("Das first", "3"), ("Das second", "5"), ("Das third", "7")]
    assert dict(printed.metadata) == {"/Producer": "pypdf", "/Title": "Fish & chips: an introduction",
                                      "/Author": "Ada Bream, The cooks"}


@needs_browser
def test_pages_come_in_order_under_running_numbers_with_what_was_folded(printed):
    text = [page.extract_text() for page in printed.pages]
    assert [page.split()[-1] for page in text[1:]] == ["2", "3", "4", "5", "6", "7", "8"]
    for number, name in enumerate(OTHER):
        assert f"hidden Das {name}" in text[2 + 2 * number]
        assert f"end of Das {name}" in text[3 + 2 * number]


@needs_browser
def test_bookmarks_are_the_pages_of_the_site_in_their_parts(printed):
    first, more, (second, third) = printed.outline
    assert [item.title for item in (first, more, second, third)] == ["Das first", "More", "Das second", "Das third"]
    assert [printed.get_destination_page_number(item) for item in (first, more, second, third)] == [2, 4, 4, 6]


@needs_browser
def test_links_lead_to_the_page_that_is_meant_and_never_to_the_server(printed):
    numbers = {page.indirect_reference.idnum: number for number, page in enumerate(printed.pages)}

    def links(page):
        notes = [note.get_object() for note in page.annotations]
        return [numbers[note["/Dest"][0].idnum] if "/Dest" in note else note["/A"]["/URI"] for note in notes]

    outside = "https://example.org/"
    assert links(printed.pages[1]) == [2, 4, 6]
    assert links(printed.pages[2]) == [3, 5, 4, outside]
    assert links(printed.pages[4]) == [5, 3, 2, outside]
    assert links(printed.pages[6]) == [7, 3, 2, outside]


def test_book_is_cited_with_the_version_of_the_library():
    assert pdf._about(pdf.ROOT)["version"] == fishlib.__version__


def test_site_of_chapters_that_have_changed_since_is_not_printed(monkeypatch):
    monkeypatch.setattr(cli, "_stale", lambda executed: ["00_why_compact"])
    monkeypatch.setattr(pdf, "print_book", None)
    result = CliRunner().invoke(cli.main, ["pdf"])
    assert result.exit_code == 1
    assert "run `fishlib run 00_why_compact` and `fishlib render`" in result.output


@pytest.mark.parametrize("file", ["chapters/second.md", "_toc.yml", "_config.yml", "_build/executed/tiny/tiny.ipynb",
                                  "_build/executed/tiny.ipynb"])
def test_site_that_is_older_than_what_it_was_rendered_from_is_not_printed(file, book, monkeypatch):
    toc = TOC | {"root": "chapters/tiny"}
    (book / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
    (book / "chapters" / "tiny.ipynb").write_text("")
    (book / "_build" / "html" / "chapters" / "tiny.html").write_text("")
    (book / file).parent.mkdir(parents=True, exist_ok=True)
    (book / file).touch()
    now = (book / file).stat().st_mtime
    os.utime(book / "_build" / "html" / "searchindex.js", (now + 10, now + 10))
    monkeypatch.setattr(browser, "browser", raising_begun)
    with pytest.raises(AssertionError, match="printing has begun"):
        pdf.print_book(root=book)
    os.utime(book / file, (now + 20, now + 20))
    with pytest.raises(ValueError, match=rf"is older than {re.escape(file)}: render the book again, `fishlib render`"):
        pdf.print_book(root=book)


def raising_begun():
    raise AssertionError("printing has begun")


def test_page_that_was_not_rendered_is_named(book):
    for file in ("searchindex.js", "chapters/second.html"):
        (book / "_build" / "html" / file).unlink()
        with pytest.raises(ValueError, match=rf"lacks {re.escape(file)}: render the book first"):
            pdf.print_book(root=book)


def test_without_a_browser_the_message_says_what_to_install(book, monkeypatch):
    monkeypatch.setattr(browser, "find", lambda: None)
    with pytest.raises(ValueError, match="install Chromium"):
        pdf.print_book(root=book)


@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "full disk"), PermissionError(errno.EACCES, "closed folder"),
                                     KeyboardInterrupt("Ctrl-C")], ids=str)
@pytest.mark.parametrize("place", [(os, "replace"), (pypdf.PdfWriter, "write")], ids=["in its place", "in the middle"])
def test_full_disk_closed_folder_or_ctrl_c_leave_the_former_file(place, trouble, tmp_path, monkeypatch):
    out = tmp_path / "book.pdf"
    out.write_bytes(b"former")

    def fail(*words):
        if len(words) == 2 and isinstance(words[0], pypdf.PdfWriter):
            words[1].write_bytes(b"half")
        raise trouble

    monkeypatch.setattr(*place, fail)
    with pytest.raises(type(trouble)):
        pdf._write(pypdf.PdfWriter(), out)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"book.pdf": b"former"}
