"""The page in a real headless Chromium, and its JSON over real HTTP, against the real service."""

import asyncio
import json
import urllib.error
import urllib.request
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from benchmarks.small_releases import small_release
from retrieval.web import page as web_page
from retrieval.web.page import Page, guarded
from tests.helpers.serving.browser import focus, keys, settled, text_of, wait
from tests.helpers.serving.real_server import Running, SmallStore, serving

NAMELESS = """
return [...document.querySelectorAll('button, input, [role]')].filter(e => {
  const label = e.labels && [...e.labels].map(l => l.textContent).join('');
  const aria = e.getAttribute('aria-label') || e.getAttribute('aria-labelledby');
  const named = aria || label || e.textContent.trim();
  return !(named || e.closest('[hidden]') || e.id === 'form');
}).map(e => e.outerHTML)
"""
LOW_CONTRAST = """
const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const luminance = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(linear);
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = e => {
  for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(colour)) return colour;
  }
  return 'rgb(255,255,255)';
};
const texts = '#status, #facts li, .card .title, .score b, .score, .summary, #stages, #painted,'
  + ' #tools, [role=tab], footer span, h1, .switch';
return [...document.querySelectorAll(texts)].filter(e => e.offsetParent).map(e => {
  const colours = [getComputedStyle(e).color, behind(e)];
  const [high, low] = colours.map(luminance).sort((x, y) => y - x);
  return [e.className || e.id || e.tagName, (high + .05) / (low + .05)];
}).filter(([, ratio]) => ratio < 4.5);
"""


@pytest.fixture
def running(running_server: Running) -> Running:
    return running_server


def request(query: str = "", entity: str = "") -> Request:
    """A request as the page's routes get it."""
    return Request(
        {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": [],
            "query_string": query.encode(),
            "path_params": {"entity": entity},
            "client": None,
        }
    )


def fetch(url: str, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers or {}), timeout=20
        ) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_api_search_and_describe_equal_the_service(running: Running) -> None:
    status, body, _ = fetch(running.http + "/api/search?q=red+cat&type=pin&k=5")
    page = json.loads(body)
    assert status == 200
    assert [len(page["hits"]), page["release_id"], page["space_id"]] == [
        5,
        running.release_id,
        running.space_id,
    ]
    exact = json.loads(fetch(running.http + "/api/search?q=red+cat&type=pin&k=5&exact=1")[1])
    assert exact["plan"] == "exact"
    assert exact["graph"]["of"] == 5
    assert exact["graph"]["found"] == sum(not hit["missed_by_graph"] for hit in exact["hits"])
    described = json.loads(fetch(running.http + "/api/describe")[1])
    assert {e["entity_type"]: e["count"] for e in described["entities"]} == {
        "pin": 300,
        "product": 120,
        "query": 80,
        "ad": 60,
    }


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("q=", 400),
        ("q=x&type=video", 404),
        ("q=x&k=0", 400),
        ("q=x&k=-5", 400),
        ("q=x&k=-99999999999", 400),
        ("q=x&k=many", 400),
        ("q=x&filter=price+%3C", 400),
        ("q=%00%20", 400),
    ],
)
def test_api_search_invalid_query_gets_http_status_and_message(
    running: Running, query: str, status: int
) -> None:
    got, body, _ = fetch(f"{running.http}/api/search?{query}")
    assert got == status
    assert json.loads(body)["error"]


def test_page_files_are_local_and_forbid_foreign_scripts(running: Running) -> None:
    for path in ("/", "/page/page.css", "/page/page.js"):
        status, body, headers = fetch(running.http + path)
        assert status == 200
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
        assert "script-src 'self'" in headers["Content-Security-Policy"]


async def test_picture_is_served_sandboxed_and_unknown_is_404(
    running: Running,
) -> None:
    page = Page(
        running.server.service,
        {"pin-1": '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'},
    )
    answer = guarded(page.picture)
    response = await answer(request(entity="pin/pin-1"))
    assert response.headers["Content-Type"].startswith("image/svg+xml")
    assert "sandbox" in response.headers["Content-Security-Policy"]
    assert (await answer(request(entity="pin/../../etc/passwd"))).status_code == 404
    assert fetch(running.http + "/api/picture/pin/nobody")[0] == 404


async def test_picture_sample_images_are_read_only_for_its_releases(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    monkeypatch.setattr(
        web_page,
        "_read_sample_images",
        lambda: reads.append("sample") or {"pin-1": "<svg>one</svg>"},
    )
    answer = guarded(Page(running.server.service).picture)

    async def status(tail: str) -> int:
        return (await answer(request(entity=tail))).status_code

    assert [
        await status(tail)
        for tail in ("x/y", "pin/pin-1", "pin/pin:1f480", "video/pin-1", "", "pin")
    ] == [404] * 6
    assert reads == []
    monkeypatch.setattr(web_page, "SAMPLE_MARKS", {"pin": "pin-0", "ad": "ad:brand-firefox"})
    assert [
        await status(tail)
        for tail in ("pin/pin-1", "pin/pin-2", "ad/pin-1", "product/pin-1", "pin/pin-1")
    ] == [
        200,
        404,
        404,
        404,
        200,
    ]
    assert reads == ["sample"]


@pytest.mark.slow
def test_sample_marks_are_ids_of_the_sample() -> None:
    from encoders.datasets.dataset import load_sample

    sample = load_sample(engaged_queries=0)
    rows = sample.catalogue.filter(
        sample.catalogue["id"].is_in(list(web_page.SAMPLE_MARKS.values()))
    )
    assert dict(zip(rows["entity_type"], rows["id"], strict=True)) == web_page.SAMPLE_MARKS
    assert set(web_page.SAMPLE_MARKS) == set(sample.entity_types)
    assert set(web_page.SAMPLE_MARKS.values()) <= set(sample.images)


def test_api_search_exact_compares_within_one_release_during_swap(
    small_store: SmallStore, tmp_path: Path
) -> None:
    with serving(small_store.copy(tmp_path / "store")) as running:
        second = small_release(
            running.store,
            small_store.bundle.folder,
            running.encoder,
            counts={"pin": 300},
            id_prefix="second-",
            activate=False,
        )
        page = Page(running.server.service)
        retrieve = page._search._retrieve
        asked: list[Any] = []

        async def ask_and_swap(*arguments: Any) -> bytes:
            answer = await retrieve(*arguments)
            asked.append(arguments)
            if len(asked) == 1:
                await running.server.releases.activate(second)
            return answer

        page._search._retrieve = ask_and_swap
        search = page.search(request("q=red+cat&exact=1&k=10"))
        shown = json.loads(asyncio.run_coroutine_threadsafe(search, running.loop).result(60).body)
        assert running.server.releases.active.release_id == second
        assert shown["release_id"] == running.release_id
        assert (len(asked), shown["graph"]["of"]) == (2, 10)
        assert shown["graph"]["found"] > 5, (
            "0 when the graph of one release is held against the entities of another"
        )


def test_api_search_with_tokens_configured_requires_one(
    small_store: SmallStore, tmp_path: Path
) -> None:
    digest = sha256(b"open sesame").hexdigest()
    (tmp_path / "tokens.toml").write_text(
        f'[[token]]\nname = "web"\nsha256 = "{digest}"\nentity_types = ["pin"]\n'
    )
    with serving(small_store, tokens=tmp_path / "tokens.toml") as running:
        url = running.http + "/api/search?q=red+cat&k=3&type="
        assert fetch(url + "pin")[0] == 401
        assert fetch(url + "pin", {"Authorization": "Bearer open sesame"})[0] == 200
        assert fetch(url + "ad", {"Authorization": "Bearer open sesame"})[0] == 403


@pytest.mark.slow
def test_page_is_usable_by_keyboard_alone(running: Running, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get(running.http + "/")
    wait(browser, lambda d: len(d.find_elements("css selector", "[role=tab]")) == 4)
    assert focus(browser) == "query", "the box has the focus at once"
    keys(browser, "red cat")
    wait(browser, settled)
    assert len(browser.find_elements("css selector", ".card")) == 24
    assert "24 results in" in text_of(browser, "#status")
    assert "q=red+cat" in browser.current_url, "the address can be shared"
    facts = text_of(browser, "#facts")
    assert "measured ANN recall@10" in facts
    assert ("encoded now" in facts) or ("cache hit" in facts)

    keys(browser, Keys.ENTER)
    wait(browser, lambda d: "cache hit" in text_of(d, "#facts"))
    wait(browser, settled)
    keys(browser, Keys.ARROW_DOWN)
    assert focus(browser) == "open title"
    first = text_of(browser, ".card .title")
    keys(browser, Keys.ARROW_RIGHT)
    keys(browser, Keys.ARROW_LEFT)
    keys(browser, Keys.ENTER)
    wait(browser, lambda d: d.execute_script("return document.getElementById('details').open"))
    assert text_of(browser, "#details-title") == first
    assert "price" in text_of(browser, "#details-attributes")
    keys(browser, Keys.ESCAPE)
    wait(browser, lambda d: not d.execute_script("return document.getElementById('details').open"))
    keys(browser, "/")
    assert focus(browser) == "query"

    keys(browser, Keys.ALT, "2")
    wait(browser, lambda d: "type=product" in d.current_url and settled(d))
    selected = browser.find_element("css selector", "[role=tab][aria-selected=true]")
    assert "Products" in selected.text
    assert selected.get_attribute("tabindex") == "0"

    keys(browser, Keys.ALT, "e")
    wait(browser, lambda d: "exact=1" in d.current_url and "graph finds" in text_of(d, "#facts"))
    assert browser.execute_script("return document.getElementById('exact').checked")
    browser.back()
    wait(
        browser,
        lambda d: (
            "exact=1" not in d.current_url
            and not d.execute_script("return document.getElementById('exact').checked")
        ),
    )


@pytest.mark.slow
def test_page_queries_tab_click_searches(running: Running, browser: Any) -> None:
    browser.get(running.http + "/?q=blue+fish&type=query")
    wait(browser, settled)
    text = text_of(browser, ".card .title")
    browser.find_element("css selector", ".open").click()
    wait(browser, lambda d: d.find_element("id", "query").get_attribute("value") == text)


def test_page_entity_text_is_not_interpreted_as_html(running: Running, browser: Any) -> None:
    browser.get(running.http + "/?q=%3Cimg+src%3Dx+onerror%3D%22document.title%3D'owned'%22%3E")
    wait(browser, settled)
    assert "owned" not in browser.execute_script(
        "return document.body.innerHTML.replace(/value=.*?>/g, '')"
    )
    browser.get(running.http + "/?q=x&type=nothing")
    wait(browser, settled)  # an unknown tab falls back to the first one


def test_page_controls_have_names_and_text_has_contrast(running: Running, browser: Any) -> None:
    browser.get_log("browser")  # what other tests left there
    browser.get(running.http + "/?q=red+cat")
    wait(browser, settled)
    nameless = browser.execute_script(NAMELESS)
    assert nameless == []
    low = browser.execute_script(LOW_CONTRAST)
    assert low == [], "WCAG AA wants 4.5 to 1"
    errors = [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "/api/picture/" not in entry["message"]
    ]
    assert errors == [], "no script error and no refused resource"


def test_page_stopped_server_shows_error(running: Running, browser: Any) -> None:
    browser.get(running.http + "/")
    wait(browser, lambda d: len(d.find_elements("css selector", "[role=tab]")) == 4)
    browser.execute_script("window.fetch = () => Promise.reject(new TypeError('gone'))")
    keys(browser, "lamp")
    wait(browser, lambda d: "does not answer" in text_of(d, "#status"))
