"""The built site, page by page. Needs `_build/html`, which `make book` makes; skipped without it."""

import json
import pkgutil
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import yaml

import fishlib
from fishlib.rerun import assets

bs4 = pytest.importorskip("bs4", reason="the checks of the site read HTML with beautifulsoup4 (extra: book)")

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
# Without the listings of source code, which are long and hold nothing of ours but links from the page of the library.
PAGES = sorted(page.relative_to(SITE).as_posix() for page in SITE.rglob("*.html") if "_modules" not in page.parts)
BOOK = [page for page in PAGES if page.startswith("chapters/")]
NOTEBOOKS = [page for page in BOOK if (ROOT / page).with_suffix(".ipynb").is_file()]
CHAPTERS = [page for page in NOTEBOOKS if not page.startswith("chapters/assignments/")]
ROLE = re.compile(r"\{(?:glue|cite|ref|numref|eq|doc|term|math|download|abbr)(?::[a-z]+)?\}|:[a-z]+:`")
FILE_NAME = re.compile(r"[\w./\\-]*\.(?:png|svg|jpe?g|gif|webp)", re.IGNORECASE)
LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src",
           "audio": "src", "embed": "src", "object": "data"}

pytestmark = pytest.mark.skipif(not (SITE / "searchindex.js").is_file(),
                                reason="the site is not built: run `make book` first")


@cache
def soup(page: str):
    return bs4.BeautifulSoup((SITE / page).read_text(encoding="utf-8"), "html.parser")


def article(page: str):
    return soup(page).find("article") or soup(page).find("main")


@cache
def prose(page: str) -> str:
    """The text of a page without code, formulas, and what only a screen without scripts shows."""
    copy = bs4.BeautifulSoup(str(article(page)), "html.parser")
    for part in copy.select("pre, code, .math, script, style, .sig"):
        part.decompose()
    return copy.get_text(" ")


@cache
def anchors(page: str) -> frozenset[str]:
    return frozenset(re.findall(r'\bid="([^"]+)"', (SITE / page).read_text(encoding="utf-8")))


def is_outside(address: str) -> bool:
    return bool(urlparse(address).netloc)


@pytest.mark.parametrize("page", BOOK)
def test_page_has_one_title_and_shows_no_error(page):
    assert len(article(page).find_all("h1")) == 1
    text = article(page).get_text()
    # The examples of the library's page show an error on purpose.
    assert "Traceback (most recent call last)" not in text or "api" in page
    assert not article(page).select(".stderr, .traceback, .problematic, .system-message")


@pytest.mark.parametrize("page", BOOK)
def test_prose_holds_no_unresolved_markup(page):
    assert ROLE.findall(prose(page)) == []
    assert "$" not in prose(page), "a formula was left as text"
    assert "None" not in re.findall(r"\w+", prose(page)) or "api" in page, "a value that was never set"


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_there_and_described(page):
    for image in soup(page).find_all("img"):
        source = image["src"]
        assert (SITE / page).parent.joinpath(unquote(source)).resolve().is_file(), f"{source} is missing"
        alternative = image.get("alt", "").strip()
        assert len(alternative) > 3, f"{source} has no alternative text"
        assert not FILE_NAME.fullmatch(alternative), f"{source} is described by a file name: {alternative}"


@pytest.mark.parametrize("page", BOOK)
def test_headings_skip_no_level(page):
    levels = [int(heading.name[1]) for heading in article(page).find_all(re.compile(r"^h[1-6]$"))]
    assert levels[0] == 1
    assert [pair for pair in pairwise(levels) if pair[1] > pair[0] + 1] == []


@pytest.mark.parametrize("page", BOOK)
def test_page_says_its_language_and_width_and_names_each_part_once(page):
    assert soup(page).html["lang"] == "en"
    assert "width=device-width" in soup(page).find("meta", attrs={"name": "viewport"})["content"]
    names = [tag["id"] for tag in soup(page).find_all(id=True)]
    assert [name for name in set(names) if names.count(name) > 1] == []


@pytest.mark.parametrize("page", BOOK)
def test_links_and_buttons_have_words(page):
    for tag in soup(page).find_all(["a", "button"]):
        if tag.name == "a" and not tag.get("href"):
            continue
        words = [tag.get_text(), *(tag.get(name, "") for name in ("aria-label", "title"))]
        words += [image.get("alt", "") for image in tag.find_all("img")]
        assert any(word.strip() for word in words), str(tag)[:200]


@pytest.mark.parametrize("page", PAGES)
def test_links_inside_the_site_lead_somewhere(page):
    for link in {link["href"] for link in soup(page).find_all("a", href=True)}:
        address, anchor = urldefrag(link)
        if is_outside(address) or address.startswith(("mailto:", "javascript:")):
            continue
        target = (SITE / page).parent.joinpath(unquote(urlparse(address).path)).resolve() if address else SITE / page
        assert target.is_file(), f"{link} leads nowhere"
        if anchor and target.suffix == ".html":
            assert unquote(anchor) in anchors(target.relative_to(SITE).as_posix()), f"no anchor {link}"


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_loaded_from_outside(page):
    vendored = (SITE / "_static" / "mathjax" / assets.ENTRY).is_file()
    loads = {tag[attribute] for name, attribute in LOADING.items() for tag in soup(page).find_all(name)
             if tag.get(attribute) and not {"canonical", "license"} & set(tag.get("rel") or [])}
    outside = {address for address in loads if is_outside(address)}
    # Where MathJax could not be fetched at set-up it is the one thing that still comes from outside.
    assert outside <= (set() if vendored else {assets.CDN})
    for script in soup(page).find_all("script", src=False):
        assert not re.search(r"https?://|//cdn", script.get_text()), "a script in the page names an address outside"


def test_styles_load_nothing_from_outside():
    for style in SITE.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_formulas_come_with_their_script_once():
    for page in BOOK:
        scripts = [tag["src"] for tag in soup(page).find_all("script", src=True) if assets.ENTRY in tag["src"]]
        assert len(scripts) <= 1, f"{page} loads MathJax twice"
        assert scripts or not article(page).select(".math"), f"{page} has formulas and no MathJax"
    assert len(article("chapters/notation.html").select(".math")) > 100


def test_search_index_finds_the_subject_of_the_book():
    text = (SITE / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    found = [index[kind].get("fisher", []) for kind in ("terms", "titleterms")]
    numbers = {number for some in found for number in ([some] if isinstance(some, int) else some)}
    assert {"chapters/index", "chapters/notation"} <= {index["docnames"][number] for number in numbers}


@pytest.mark.parametrize("page", NOTEBOOKS)
def test_launch_buttons_open_this_chapter_in_the_configured_repository(page):
    repository = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    name = urlparse(repository["url"]).path.strip("/")
    notebook = Path(page).with_suffix(".ipynb").as_posix()
    links = {link["href"] for link in soup(page).find_all("a", href=True)}
    assert f"https://colab.research.google.com/github/{name}/blob/{repository['branch']}/{notebook}" in links
    assert f"https://mybinder.org/v2/gh/{name}/{repository['branch']}?urlpath=lab/tree/{notebook}" in links


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapter_shows_one_open_parameters_cell_and_its_provenance(page):
    cells = article(page).select("div.cell.tag_parameters, div.cell.tag_injected-parameters")
    assert len([cell for cell in cells if not cell.select("details")]) == 1
    assert len(article(page).select("table.provenance")) == 1


def test_first_page_links_every_chapter_and_no_chapter_is_still_called_planned():
    rows = [row for row in article("chapters/index.html").select("table tr") if row.find("td")]
    linked = {link["href"] for row in rows if "planned" not in row.get_text() for link in row.find_all("a", href=True)}
    assert linked == {Path(page).name for page in CHAPTERS}


def test_assignments_are_shown_with_their_blanks_and_without_solutions_or_masters():
    shown = {Path(page).stem for page in NOTEBOOKS if page not in CHAPTERS}
    assert shown == {path.stem for path in (ROOT / "chapters" / "assignments").glob("*.ipynb")}
    assert not list(SITE.rglob("*masters*"))
    for name in shown:
        text = article(f"chapters/assignments/{name}.html").get_text()
        assert "..." in text
        assert "BEGIN SOLUTION" not in text


def test_library_page_documents_every_module():
    modules = {f"fishlib.{module.name}" for module in pkgutil.iter_modules(fishlib.__path__)}
    page = (ROOT / "chapters" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. automodule:: (\S+)", page, re.MULTILINE))
    assert modules - documented == set(), "add them to chapters/api.md"
