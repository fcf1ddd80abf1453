"""The built site in a browser that has no network: search, themes, keyboard, formulas, narrow screens, accessibility.

Needs `_build/html`, a Chromium and the extra `browser`; what is missing is named when the tests are skipped.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fishlib.rerun import browser

pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'fishlib[browser]'")

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
BOOK = sorted(page.relative_to(SITE).as_posix() for page in (SITE / "chapters").rglob("*.html"))
CHAPTER = "chapters/05_channel_divergence.html"
SIX = ["chapters/index.html", "chapters/notation.html", "chapters/00_why_compact.html", CHAPTER,
       "chapters/howto_cluster.html", "chapters/api.html"]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}

pytestmark = [
    pytest.mark.skipif(not (SITE / "searchindex.js").is_file(), reason="the site is not built: run `make book` first"),
    pytest.mark.skipif(browser.find() is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed")]


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as program:
        yield program


@pytest.fixture(scope="module")
def address():
    with browser.served(SITE) as here:
        yield here


class Reader:
    """A window of its own; what it complains of and what it asks of other machines is written down, not sent."""

    def __init__(self, chromium, address, **options):
        self.address, self.complaints, self.outside = address, [], []
        self.context = chromium.new_context(**options)
        self.context.route("**/*", self._route)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))

    def _route(self, route):
        if route.request.url.startswith((self.address, "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def open(self, page):
        self.page.goto(self.address + page, wait_until="load")
        self.page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
        return self.page


@pytest.fixture
def reader(chromium, address):
    """Opens windows: `reader(theme="dark", viewport=NARROW)`."""
    opened = []

    def start(theme="light", viewport=WIDE):
        opened.append(Reader(chromium, address, color_scheme=theme, viewport=viewport, reduced_motion="reduce"))
        return opened[-1]

    yield start
    for window in opened:
        window.context.close()


@pytest.mark.parametrize("page", BOOK)
def test_page_opens_without_complaint_or_network_fits_a_phone_and_can_be_read_in_the_dark(page, reader):
    """One test a page, for opening it costs more than all that is asked of it."""
    window = reader()
    shown = window.open(page)
    assert window.outside == []
    assert window.complaints == []
    assert shown.locator("mjx-merror").count() == 0
    assert shown.locator("article .math").count() == shown.locator("article .math:has(mjx-container)").count()

    shown.emulate_media(color_scheme="dark")
    assert shown.evaluate("document.documentElement.dataset.theme") == "dark"
    for figure in shown.locator("article img:visible").all():
        name = figure.get_attribute("alt")
        assert figure.evaluate("image => image.complete && image.naturalWidth > 0"), name
        assert contrast(figure.screenshot()) > 4.5, name

    shown.set_viewport_size(NARROW)
    assert shown.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    shown.evaluate("window.scrollTo(200, 0)")
    assert shown.evaluate("window.scrollX") == 0


def test_search_finds_a_term_and_leads_to_its_page(reader):
    window = reader()
    shown = window.open("chapters/index.html")
    shown.keyboard.press("Control+k")
    shown.keyboard.type("Hyvärinen")
    shown.keyboard.press("Enter")
    found = shown.locator("#search-results ul.search li a")
    found.first.wait_for()
    assert "Notation" in found.all_inner_texts()
    found.filter(has_text="Notation").first.click()
    shown.wait_for_url("**/notation.html*")
    assert window.complaints == []


def test_theme_changes_colours_and_is_kept_on_the_next_page(reader):
    window = reader()
    shown = window.open("chapters/index.html")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = shown.evaluate(colour)
    for _ in range(3):
        if shown.evaluate("document.documentElement.dataset.theme") != "dark":
            shown.locator("button.theme-switch-button:visible").first.click()
    assert shown.evaluate("document.documentElement.dataset.theme") == "dark"
    dark = shown.evaluate(colour)
    assert dark != light
    assert window.open("chapters/notation.html").evaluate(colour) == dark


def test_theme_follows_the_machine_until_one_is_chosen(reader):
    assert reader(theme="dark").open("chapters/index.html").evaluate("document.documentElement.dataset.theme") == "dark"


def test_keyboard_skips_to_the_chapter_and_goes_through_it_to_its_end(reader):
    shown = reader().open(CHAPTER)
    shown.keyboard.press("Tab")
    assert "Skip" in shown.evaluate("document.activeElement.innerText")
    shown.keyboard.press("Enter")
    reached = []
    for _ in range(1000):
        shown.keyboard.press("Tab")
        stop = shown.evaluate("""() => {
            const it = document.activeElement, box = it.getBoundingClientRect(), style = getComputedStyle(it);
            return {inside: !!it.closest('article'), words: it.innerText || it.title || it.ariaLabel || it.tagName,
                    seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
                    marked: style.outlineStyle !== 'none' || style.boxShadow !== 'none'}}""")
        if reached and not stop["inside"]:
            break
        if stop["inside"]:
            reached.append(stop)
    assert len(reached) > 20
    assert [stop["words"] for stop in reached if not stop["seen"]] == []
    assert [stop["words"] for stop in reached if not stop["marked"]] == []
    links = shown.locator("article a[href]:visible").count()
    assert len(reached) >= links, "links that the keyboard does not reach"


def test_keyboard_opens_a_folded_solution(reader):
    shown = reader().open(CHAPTER)
    folded = shown.locator("article details:not([open]) > summary").first.element_handle()
    folded.focus()
    shown.keyboard.press("Enter")
    assert folded.evaluate("summary => summary.parentElement.open")


def contrast(picture: bytes) -> float:
    """The contrast ratio of WCAG between the ground of a picture, its most frequent colour, and its strongest ink."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3) / 255
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    light = linear @ [0.2126, 0.7152, 0.0722]
    values, counts = np.unique(light.round(3), return_counts=True)
    ground = values[counts.argmax()]
    ratio = np.maximum((light + 0.05) / (ground + 0.05), (ground + 0.05) / (light + 0.05))
    return float(np.quantile(ratio, 0.997))


def test_contrast_is_measured_as_the_guidelines_do():
    page = np.full((100, 100, 3), 255, np.uint8)
    page[:, :5] = 118  # the lightest grey that passes on white
    picture = io.BytesIO()
    Image.fromarray(page).save(picture, "png")
    assert contrast(picture.getvalue()) == pytest.approx(4.54, abs=0.02)


@pytest.mark.parametrize("page", SIX)
def test_page_has_no_serious_or_critical_finding_of_axe(page, reader):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install 'fishlib[browser]'")
    shown = reader().open(page)
    for theme in ("light", "dark"):
        shown.emulate_media(color_scheme=theme)
        assert shown.evaluate("document.documentElement.dataset.theme") == theme
        findings = axe.Axe().run(shown).response["violations"]
        serious = [f"{finding['id']}: {node['target']} {node.get('failureSummary', '')}" for finding in findings
                   if finding["impact"] in ("serious", "critical") for node in finding["nodes"]]
        assert serious == [], theme
