"""The built site in a browser that has no network: search, themes, keyboard, formulas, narrow screens, accessibility.

Needs `_build/html`, a Chromium and the extra `browser`; what is missing is named when the tests are skipped.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fishlib.rerun import assets, browser

pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'fishlib[browser]'")

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
BOOK = sorted(page.relative_to(SITE).as_posix() for page in (SITE / "chapters").rglob("*.html"))
CHAPTER = "chapters/05_channel_divergence.html"
FOR_AXE = ["chapters/index.html", "chapters/notation.html", "chapters/00_why_compact.html", CHAPTER,
           "chapters/howto_cluster.html", "chapters/api.html", "chapters/09_scorecard.html"]
# Where MathJax could not be fetched at set-up it is the one thing that comes from outside, and not at all without a network.
VENDORED = (SITE / "_static" / "mathjax" / assets.ENTRY).is_file()
OUTSIDE = () if VENDORED else (assets.CDN,)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}

pytestmark = [
    pytest.mark.skipif(not (SITE / "searchindex.js").is_file(), reason="the site is not built: run `make book` first"),
    pytest.mark.skipif(browser.find() is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed")]


@pytest.fixture(scope="module")
def chromium():
    with browser.browser(offline=True) as program:
        yield program


@pytest.fixture(scope="module")
def address():
    with browser.served(SITE) as here:
        yield here


@pytest.fixture(scope="module")
def profile(chromium):
    """What windows share that do not matter to one another: scripts, once loaded, stay in memory."""
    return chromium.new_context(color_scheme="light", viewport=WIDE, reduced_motion="reduce")


class Reader:
    """A window; what it complains of and what it asks of other machines is written down."""

    def __init__(self, context, address):
        context.set_default_timeout(180_000)  # a busy machine is slow, not wrong
        self.address, self.complaints, self.outside = address, [], []
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: line.type != "error" or line.location["url"] in OUTSIDE
                     or self.complaints.append(line.text))
        self.page.on("request", lambda request: request.url.startswith((address, "data:", "blob:", *OUTSIDE))
                     or self.outside.append(request.url))

    def open(self, page):
        self.page.goto(self.address + page, wait_until="load")
        self.page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
        return self.page

    def colour(self, theme):
        """What the button of the theme does, which has a test of its own."""
        self.page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)


@pytest.fixture
def reader(profile, address):
    window = Reader(profile, address)
    yield window
    window.page.close()


@pytest.fixture
def dark_reader(chromium, address):
    """A window on a machine that asks for dark colours, with settings of its own."""
    context = chromium.new_context(color_scheme="dark", viewport=WIDE)
    yield Reader(context, address)
    context.close()


@pytest.mark.parametrize("page", BOOK)
def test_page_opens_without_complaint_or_network_fits_a_phone_and_can_be_read_in_the_dark(page, reader):
    """One test a page, for opening it costs more than all that is asked of it."""
    shown = reader.open(page)
    assert reader.outside == []
    assert reader.complaints == []
    assert shown.locator("mjx-merror").count() == 0
    if VENDORED:
        assert shown.locator("article .math").count() == shown.locator("article .math:has(mjx-container)").count()

    reader.colour("dark")
    for figure in shown.locator("article img:visible").all():
        name = figure.get_attribute("alt")
        assert figure.evaluate("image => image.complete && image.naturalWidth > 0"), name
        assert contrast(figure.screenshot()) > 4.5, name

    shown.set_viewport_size(NARROW)
    assert shown.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    shown.evaluate("window.scrollTo(200, 0)")
    assert shown.evaluate("window.scrollX") == 0


def test_search_finds_a_term_and_leads_to_its_page(reader):
    shown = reader.open("chapters/index.html")
    shown.keyboard.press("Control+k")
    shown.keyboard.type("Hyvärinen")
    shown.keyboard.press("Enter")
    found = shown.locator("#search-results ul.search li a")
    found.first.wait_for()
    assert "Notation" in found.all_inner_texts()
    found.filter(has_text="Notation").first.click()
    shown.wait_for_url("**/notation.html*")
    assert reader.complaints == []


def test_theme_changes_colours_and_is_kept_on_the_next_page(dark_reader):
    """It starts dark, as the machine asks, until another one is chosen."""
    shown = dark_reader.open("chapters/index.html")
    colour = "getComputedStyle(document.body).backgroundColor"
    theme = "document.documentElement.dataset.theme"
    dark = shown.evaluate(colour)
    assert shown.evaluate(theme) == "dark"
    for _ in range(3):
        if shown.evaluate(theme) != "light":
            shown.locator("button.theme-switch-button:visible").first.click()
    light = shown.evaluate(colour)
    assert light != dark
    assert dark_reader.open("chapters/notation.html").evaluate(colour) == light


def test_keyboard_skips_to_the_chapter_and_goes_through_it_to_its_end(reader):
    shown = reader.open(CHAPTER)
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
    shown = reader.open(CHAPTER)
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


@pytest.mark.parametrize("page", FOR_AXE)
def test_page_has_no_serious_or_critical_finding_of_axe(page, reader):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install 'fishlib[browser]'")
    shown = reader.open(page)
    for theme in ("light", "dark"):
        reader.colour(theme)
        findings = axe.Axe().run(shown).response["violations"]
        serious = [f"{finding['id']}: {node['target']} {node.get('failureSummary', '')}" for finding in findings
                   if finding["impact"] in ("serious", "critical") for node in finding["nodes"]]
        assert serious == [], theme
