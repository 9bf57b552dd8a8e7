"""The web page: what it holds, that it needs nothing else, and that it works in a browser."""

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import leaderboards
from leaderboards import figures, page

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
STRANGER = "<img src=x onerror=alert(1)>"


def picture(explainers, seed=0, size=224):
    rng = np.random.default_rng(seed)
    roi = np.zeros((size, size), dtype=bool)
    roi[60:120, 80:140] = True
    maps = {name: np.kron(rng.normal(size=(14, 14)), np.ones((size // 14, size // 14))) for name in explainers}
    image = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
    facts = {"dataset": "toy", "model": "vit", "sample": f"s{seed}", "title": f"sample {seed} {STRANGER}"}
    return facts | {"image": image, "roi": roi, "maps": maps, "signed": {name: i % 2 for i, name in enumerate(maps)}}


@pytest.fixture
def boards(tables):
    """A board with a failed submission whose texts are hostile."""
    failed = {"dataset": "toy", "model": "vit", "explainer": STRANGER, "explainer_version": "1", "params": "{}"}
    failed |= {"trivial": False, "seconds_per_image": np.nan, "status": "failed", "info": STRANGER, "n_failed": 3}
    explainers = pd.concat([tables.explainers, pd.DataFrame([failed])])
    metrics = tables.metrics.assign(description="what it measures")
    return leaderboards.build(tables.scores, metrics, explainers, tables.run, n_boot=200)


@pytest.fixture
def index(boards, tmp_path):
    """The page of `boards` with two pictures."""
    names = ["good", "random", "constant"]
    return page.write(boards, [picture(names, seed) for seed in (0, 1)], tmp_path)


@pytest.fixture
def browser():
    """Headless Chromium."""
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium in /usr/bin/chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as session:
        chromium = session.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, index):
    """The page, open, with everything it said or asked for."""
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(index.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", timeout=20_000)
    return tab, said, asked


def names(tab):
    return [text.split("\n")[0] for text in tab.locator("tbody td.name").all_inner_texts()]


def column(tab, number):
    texts = tab.locator(f"tbody tr td:nth-child({number})").all_inner_texts()
    return [float(text.split()[0]) for text in texts if text[0] != "–"]


def sorted_by(tab, title):
    """Wait until the rows are in their new order."""
    tab.locator("th.dt-ordering-asc, th.dt-ordering-desc", has_text=title).first.wait_for(timeout=5000)


def test_page_asks_for_nothing_and_complains_of_nothing(opened, index):
    _, said, asked = opened
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [index.as_uri()]


def test_columns_sort_best_first(opened):
    tab, said, _ = opened
    assert names(tab)[0] == "good"
    for title in ("srg", "class_correlation"):
        heading = tab.locator("thead th", has_text=title)
        number = int(heading.get_attribute("data-dt-column")) + 1
        heading.click()
        sorted_by(tab, title)
        assert column(tab, number) == sorted(column(tab, number), reverse=title == "srg")
    assert names(tab)[-1] in ("constant", STRANGER)  # without a value, last
    tab.locator("thead th", has_text="explainer").first.click()
    sorted_by(tab, "explainer")
    assert names(tab)[1:] == sorted(names(tab)[1:])
    assert said == []


def test_search_finds_rows(opened):
    tab, _, _ = opened
    tab.locator("input[type=search]").fill("rand")
    tab.wait_for_function("document.querySelectorAll('tbody tr').length < 7")
    assert names(tab) == ["random"]


def test_phone_scrolls_the_table_and_not_the_page(browser, index):
    tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    tab.goto(index.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", timeout=20_000)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 27)"


def test_texts_of_strangers_are_escaped(index):
    html = index.read_text()
    assert "<img src=x" not in html and "&lt;img src=x" in html


class Links(HTMLParser):
    """Everything that a page loads by itself."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset") and tag != "a"]


def test_nothing_is_loaded_from_elsewhere(index):
    html = index.read_text()
    assert "@import" not in html and "url(" not in html
    links = Links(html).found
    assert len(links) > 6 and all(target.startswith("data:") for target in links)


def test_page_says_what_a_reader_needs(index):
    html = index.read_text()
    for text in ("what it measures", "class_correlation 48 (constant map)", "2 of 2", "region of interest", "m1"):
        assert text in html
    assert html.count('<span class="badge trivial">trivial</span>') == 3  # two rows and the explanation
    assert html.count("beats no trivial row") == 1  # plain


def test_page_of_the_largest_size_stays_small(boards, tmp_path):
    many = [picture([f"explainer_{i}" for i in range(14)], seed) for seed in range(6)]
    assert page.write(boards, many, tmp_path).stat().st_size < 3_000_000


def test_page_without_pictures_or_region(boards, tmp_path):
    assert "Pictures" not in page.write(boards, [], tmp_path).read_text()
    bare = picture(["good"]) | {"roi": None}
    assert 'alt="region of interest' not in page.write(boards, [bare], tmp_path).read_text()


def test_map_that_is_not_finite_is_said_so(boards, tmp_path):
    broken = picture(["good"])
    broken["maps"]["good"][0, 0] = np.nan
    assert "map not finite" in page.write(boards, [broken], tmp_path).read_text()


def test_signed_map_is_centred_at_zero():
    grey = np.full((56, 56, 3), 128, dtype=np.uint8)
    values = np.zeros((56, 56))
    values[:28, :28], values[28:, 28:] = 5, -1
    red, blue, none = figures.heat_map(grey, values, signed=True)[[10, 118, 10], [10, 118, 118]].astype(int)
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 10
    assert np.ptp(none) <= 1 and abs(none[0] - 128) <= 1


def test_unsigned_map_runs_from_low_to_high():
    grey = np.full((56, 56, 3), 128, dtype=np.uint8)
    drawn = figures.heat_map(grey, np.linspace(3, 4, 56)[None].repeat(56, axis=0), signed=False)
    brightness = drawn.astype(int).sum(axis=2)[0]
    assert (np.diff(brightness) >= -3).all() and brightness[-1] > brightness[0] + 200


def test_outline_marks_the_border_only():
    thumbnail = np.zeros((128, 128, 3), dtype=np.uint8)
    roi = np.zeros((256, 256), dtype=bool)
    roi[64:128, 64:128] = True
    drawn = figures.outline(thumbnail, roi).any(axis=2)
    assert drawn[32, 32:64].all() and not drawn[40, 40] and not drawn[10, 10]


@pytest.mark.parametrize(
    ("shape", "expected"), [((224, 224), (128, 128)), ((300, 600), (64, 128)), ((56, 28), (128, 64))]
)
def test_thumbnails_keep_their_proportions(shape, expected):
    assert figures.image(np.zeros((*shape, 3), dtype=np.uint8)).shape == (*expected, 3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.12345, "0.123"),
        (12.345, "12.3"),
        (1234.5, "1234"),
        (1e-6, "1.0e-06"),
        (np.nan, "–"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert page._text(value) == text
