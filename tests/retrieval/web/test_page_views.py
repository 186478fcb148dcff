"""The views of the page in a real Chromium: legs, reasons, columns, filters; checked by axe."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helpers.serving.browser import focus, keys, settled, text_of, wait
from tests.helpers.serving.real_server import Running

pytestmark = pytest.mark.slow
AXE = "axe-core@4.14.1"
RUN_AXE = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ['violations']}).then(
  (found) => done(found.violations.map((v) => [v.id, v.nodes.map((n) => n.html.slice(0, 200))])),
  (error) => done([['axe', [String(error)]]]),
);
"""
WHALE = "/?q=blue+whale"
VIEWS = {
    "pictures": WHALE,
    "list": WHALE + "&type=product",
    "filtered": WHALE + "&type=product&f=brand:Acme&f=price:..100&filter=sale==true",
    "exact": WHALE + "&exact=1&view=list",
    "columns": WHALE + "&vs=legs:lexical",
    "queries": WHALE + "&type=query",
    "sure": WHALE + "&sure=0.25",
    "empty": "/",
}
PAINT_MS = 150


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which says what of a page is not accessible."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed (Debian: apt-get install npm)")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent", AXE]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    if installed.returncode:
        pytest.skip(f"npm could not install {AXE}: {installed.stderr[-200:]}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def page(browser: Any, showcase: Running) -> Iterator[Callable[[str], Any]]:
    """Opens an address of the page; widths and colours are put back afterwards."""

    def show(address: str) -> Any:
        browser.get(showcase.http + address)
        if "q=" in address:
            wait(browser, settled)
        else:
            wait(browser, lambda d: d.find_elements("css selector", "#samples button"))
        return browser

    yield show
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def set_view(browser: Any, width: int, colours: str) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": colours}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def titles(browser: Any, column: str = "results") -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    found: list[str] = browser.execute_script(script, f"#{column} .title")
    return found


def click(browser: Any, selector: str) -> None:
    browser.find_element("css selector", selector).click()
    wait(browser, settled)


def choose(browser: Any, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", "versus")).select_by_value(value)
    wait(browser, settled)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("width", "colours"), [(1200, "light"), (1200, "dark"), (320, "light")])
def test_axe_finds_no_violation(
    page: Callable[[str], Any], browser: Any, axe: str, view: str, width: int, colours: str
) -> None:
    set_view(browser, width, colours)
    page(VIEWS[view])
    browser.execute_script(axe)
    assert browser.execute_async_script(RUN_AXE) == []
    widest = browser.execute_script("return document.documentElement.scrollWidth")
    assert widest <= width, "nothing is scrolled sideways"


def test_axe_finds_no_violation_in_the_details(page: Callable[[str], Any], axe: str) -> None:
    browser = page(WHALE)
    browser.find_element("css selector", ".open").click()
    browser.execute_script(axe)
    assert browser.execute_async_script(RUN_AXE) == []
    why = text_of(browser, "#details-why")
    assert "Known queries like this one" in why and "blue whale" in why
    rows = browser.find_elements("css selector", "#details-why tbody tr")
    assert [row.text.split()[0] for row in rows] == ["Vectors", "Words", "Votes"]


def test_hit_says_why_it_is_there(page: Callable[[str], Any]) -> None:
    browser = page(WHALE)
    script = (
        "return [...document.querySelectorAll('.card:first-child mark')].map((e) => e.textContent)"
    )
    assert {"Blue", "whale"} <= set(browser.execute_script(script))
    assert text_of(browser, ".card .voters q") == "blue whale"
    described = browser.find_element("css selector", ".open").get_attribute("aria-describedby")
    assert "like" in text_of(browser, f"#{described}") and "cosine" in text_of(browser, ".about")
    shares = browser.execute_script(
        "return [...document.querySelectorAll('.card .bar')[0].children].map((e) => e.className)"
    )
    assert shares == ["dense", "lexical", "votes"]


def test_misspelt_word_is_marked_by_its_letters(page: Callable[[str], Any]) -> None:
    browser = page("/?q=bicylce&legs=lexical")
    assert text_of(browser, "mark.letters") == "bicycle"


def test_legs_are_switched_by_keyboard_and_kept_in_the_address(page: Callable[[str], Any]) -> None:
    browser = page(WHALE)
    assert "vectors + words + votes" in text_of(browser, "#facts")
    browser.execute_script("document.querySelector('#legs [value=votes]').focus()")
    keys(browser, " ")
    wait(browser, lambda d: "legs=dense%2Clexical" in d.current_url and settled(d))
    assert browser.execute_script("return document.activeElement.value") == "votes"
    assert "vectors + words" in text_of(browser, "#facts")
    assert not browser.find_elements("css selector", ".voters")
    browser.refresh()
    wait(browser, settled)
    checked = browser.find_elements("css selector", "#legs input:checked")
    assert [box.get_attribute("value") for box in checked] == ["dense", "lexical"]
    keys(browser, "")
    click(browser, "#legs [value=votes]")
    assert "legs=" not in browser.current_url, "as the release decides"


@pytest.mark.parametrize("versus", ["exact", "legs:dense", "legs:lexical", "release:first"])
def test_columns_mark_what_both_share(page: Callable[[str], Any], versus: str) -> None:
    browser = page(WHALE)
    choose(browser, versus)
    wait(browser, lambda d: titles(d, "others"))
    mine, others = titles(browser), titles(browser, "others")
    both = set(mine) & set(others)
    for column, shown in (("results", mine), ("others", others)):
        marked = browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            f"#{column} .both .title",
        )
        assert set(marked) == both and len(shown) == 24
    assert f"{len(both)} of them in both" in text_of(browser, "#status")
    if versus == "release:first":
        assert "Release first" in text_of(browser, "#others-name")
    browser.refresh()
    wait(browser, lambda d: titles(d, "others") == others)


def test_least_probability_drops_hits_and_is_asked_only_of_answers_that_have_one(
    page: Callable[[str], Any],
) -> None:
    from selenium.webdriver.support.ui import Select

    browser = page(WHALE)
    everything = titles(browser)
    Select(browser.find_element("id", "sure")).select_by_value("0.25")
    wait(browser, lambda d: 0 < len(titles(d)) < len(everything) and settled(d))
    assert "sure=0.25" in browser.current_url
    sure = titles(browser)
    assert sure == everything[: len(sure)]
    choose(browser, "legs:dense")
    wait(browser, lambda d: len(titles(d, "others")) == 24)
    browser.refresh()
    wait(browser, lambda d: settled(d) and titles(d) == sure)
    assert not page(WHALE + "&type=product&sure=0.25").find_element("id", "sure").is_displayed()
    assert len(titles(browser)) == 24


def test_columns_are_walked_by_arrows(page: Callable[[str], Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = page(WHALE + "&vs=legs:lexical")
    browser.find_element("id", "query").send_keys(Keys.ARROW_DOWN)
    keys(browser, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    script = """
    const card = document.activeElement, list = card.closest('ol');
    return [list.id, [...list.querySelectorAll('.open')].indexOf(card)];
    """
    assert browser.execute_script(script) == ["others", 1]


def test_facets_narrow_and_chips_widen(page: Callable[[str], Any]) -> None:
    browser = page(WHALE + "&type=product")
    legends = [e.text.lower() for e in browser.find_elements("css selector", "#facets legend")]
    assert legends[0] == "language" and {"brand", "price", "sale", "tags"} <= set(legends)
    assert "Arabic" in text_of(browser, "#facets fieldset")
    boxes = browser.find_elements("css selector", "#facets [data-field=brand] input")
    assert len(boxes) == 3
    for number in (0, 1):
        browser.find_elements("css selector", "#facets [data-field=brand] input")[number].click()
        wait(browser, settled)
    assert (
        browser.execute_script("return document.activeElement.closest('fieldset').dataset.field")
        == "brand"
    ), "the focus stays"
    click(browser, "#facets [data-field=price] label:last-of-type input")
    click(browser, "#facets [data-field=tags] input")
    chips = browser.find_elements("css selector", "#chips button")
    assert [chip.text.split(":")[0] for chip in chips] == ["brand", "brand", "price", "tags"]
    assert text_of(browser, "#status").startswith(str(len(titles(browser))))
    address = browser.current_url
    narrowed = titles(browser)
    browser.get("about:blank")
    browser.get(address)
    wait(browser, settled)
    assert titles(browser) == narrowed
    for _ in chips:
        browser.find_element("css selector", "#chips button").click()
        wait(browser, settled)
    assert not browser.find_elements("css selector", "#chips button")
    assert focus(browser) == "query"
    assert len(titles(browser)) == 24


def test_filter_expression_is_sent_and_its_errors_are_shown(page: Callable[[str], Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = page(WHALE + "&type=product")
    field = browser.find_element("id", "where")
    field.send_keys('brand == "Ökö & \\"Co\\"" and price < 60', Keys.ENTER)
    wait(browser, lambda d: d.find_elements("css selector", "#chips button") and settled(d))
    facts = {e.text for e in browser.find_elements("css selector", ".summary .fact:first-child")}
    assert facts and len(titles(browser)) < 24
    field.clear()
    field.send_keys("price <", Keys.ENTER)
    wait(browser, lambda d: "filter" in text_of(d, "#status"))


def test_texts_have_their_own_direction(page: Callable[[str], Any]) -> None:
    browser = page("/?q=حوت+أزرق&legs=lexical")
    directions = browser.execute_script(
        "return ['.title', '#query', '.field bdi'].map((s) =>"
        " getComputedStyle(document.querySelector(s)).direction)"
    )
    assert directions == ["rtl"] * 3


def test_grid_where_there_are_pictures_and_list_where_not(page: Callable[[str], Any]) -> None:
    browser = page(WHALE)
    assert browser.find_elements("css selector", "ol.grid .picture img")
    click(browser, "#view")
    assert "view=list" in browser.current_url
    assert browser.find_elements("css selector", "ol.list .summary")
    page(WHALE + "&type=product")
    assert browser.find_elements("css selector", "ol.list .card")
    assert not browser.find_elements("css selector", ".picture")


def test_more_hits_and_releases_are_in_the_address(page: Callable[[str], Any]) -> None:
    from selenium.webdriver.support.ui import Select

    browser = page(WHALE)
    click(browser, "#more-hits")
    wait(browser, lambda d: len(titles(d)) == 48)
    assert "k=48" in browser.current_url
    Select(browser.find_element("id", "release")).select_by_value("first")
    wait(browser, lambda d: "release first" in text_of(d, "#release-name") and settled(d))
    assert "release=first" in browser.current_url
    browser.back()
    wait(browser, lambda d: "release second" in text_of(d, "#release-name") and settled(d))


def test_typing_is_answered_at_once_and_older_requests_end(page: Callable[[str], Any]) -> None:
    browser = page("/?legs=lexical")
    browser.execute_script(
        "window.asked = []; const own = window.fetch;"
        "window.fetch = (path, o) => { window.asked.push(path); return own(path, o); }"
    )
    text = "blue window number 11"
    keys(browser, text)
    wait(browser, lambda d: settled(d) and titles(d)[:1] == [text])
    asked = browser.execute_script("return window.asked")
    assert "q=b&" in asked[0] and len(asked) < len(text)


def test_first_answer_is_painted_soon_after_the_key(page: Callable[[str], Any]) -> None:
    painted = []
    for key in ("w", "l", "c", "b", "t"):
        browser = page("/")
        keys(browser, key)
        wait(browser, lambda d: d.execute_script("return performance.getEntriesByName('answer')"))
        script = "return performance.getEntriesByName('answer')[0].duration"
        painted.append(browser.execute_script(script))
    print("ms from the key press to the painted answer:", [round(ms) for ms in painted])
    others = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # their share is not the page's
    assert min(painted) <= PAINT_MS * others
