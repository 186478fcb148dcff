"""A headless Chromium, and a server whose answers have all that the page can show."""

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from index_builder.building.build import build_release
from index_builder.building.inputs import EntityInput
from index_builder.building.plan import RebuildConfig
from index_builder.fusion.engagements import Engagements
from index_builder.fusion.probability import ProbabilityCurve
from index_builder.fusion.weights import given_fusion
from index_builder.releases.store import ReleaseStore
from index_builder.search.entity_index import IndexConfig
from tests.helpers.serving.node_clients import install_node_clients
from tests.helpers.serving.real_server import Running, SmallBundle, SmallStore, serving

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
]


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of clients for Node beside their packages."""
    return install_node_clients(tmp_path_factory.mktemp("node") / "clients")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not CHROMIUM or not DRIVER:
        pytest.skip(
            "chromium and chromedriver are not installed (Debian: apt-get install chromium"
            " chromium-driver)"
        )
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="the package selenium is not installed (pip install selenium)"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=DRIVER)
    )
    yield driver
    driver.quit()


KNOWN = ["blue whale", "golden lamp", "red garden chair", "حوت أزرق", "青い鯨"]
"""Known queries; the first led to p0 and p1, the others to one entity each."""
CURVE = ProbabilityCurve((0.0, 6.0), (0.1, 0.9))
FITTED = replace(given_fusion((1.0, 2.0, 3.0)), probability=CURVE)
FIRST = [
    ("Blue whale breathing at the surface", "A whale in the morning, seen from a boat", "en"),
    ("Whale tail above a river of stone", "Printed on paper, blue and silver", "en"),
    ("حوت أزرق في المحيط عند الصباح", "ملصق كبير للحائط يظهر حوتا أزرق", "ar"),
    ("לווייתן כחול בים בלילה", "כרזה גדולה לקיר", "he"),
    ("夜の海を泳ぐ青い鯨のポスター", "青い鯨と月", "ja"),
    ("नीली व्हेल का चित्र", "दीवार के लिए पोस्टर", "hi"),
    ("Großer Blauwal im Winter", "Ein Plakat für die Küche", "de"),
]
COLOURS = ("red", "blue", "green", "silver", "golden")
THINGS = ("chair", "lamp", "table", "boat", "window", "bicycle", "whale")


def _catalogue(rows: int) -> pl.DataFrame:
    """Titles in several languages, then generated ones; attributes of every kind."""
    texts = [
        *FIRST,
        *(
            (f"{COLOURS[i % 5]} {THINGS[i % 7]} number {i}", f"A {THINGS[(i + 1) % 7]} too", "en")
            for i in range(len(FIRST), rows)
        ),
    ]
    return pl.DataFrame(
        {
            "title": [title for title, _, _ in texts],
            "description": [description for _, description, _ in texts],
            "language": [language for _, _, language in texts],
            "brand": [("Acme", "Zenith", 'Ökö & "Co"')[i % 3] for i in range(rows)],
            "price": [round(3 + 7.5 * (i % 40), 2) for i in range(rows)],
            "sale": [i % 3 == 0 for i in range(rows)],
            "tags": [["home", ("indoor", "outdoor")[i % 2]] for i in range(rows)],
        }
    )


def _drawing(number: int) -> str:
    """A small SVG of its own for every entity."""
    hue = 47 * number % 360
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><circle cx="5" cy="5"'
        f' r="4" fill="hsl({hue} 70% 55%)"/></svg>'
    )


def _release(store: ReleaseStore, bundle: SmallBundle, name: str, rows: int) -> str:
    encode = bundle.encoder.encode
    catalogue = _catalogue(rows)
    pairs = pl.DataFrame(
        {"query": [KNOWN[0], *KNOWN], "entity_id": ["p0", "p1", "p8", "p12", "p2", "p4"]}
    )
    shared: dict[str, Any] = {
        "vectors": np.ascontiguousarray(encode(catalogue["title"].to_list())),
        "space_id": bundle.space_id,
        "texts": catalogue.select("title", "description"),
    }
    pins = catalogue.with_columns(picture=pl.Series(map(_drawing, range(rows))))
    inputs = {
        "pin": EntityInput(
            ids=[f"p{i}" for i in range(rows)],
            attributes=pins,
            engagements=Engagements(pairs, fusion=FITTED),
            **shared,
        ),
        "product": EntityInput(ids=[f"p{i}" for i in range(rows)], attributes=catalogue, **shared),
        "query": EntityInput(ids=KNOWN, vectors=encode(KNOWN), space_id=bundle.space_id),
    }
    config = RebuildConfig(
        index=IndexConfig(kind="exact"), golden_queries=4, release_id=name, activate=name == "first"
    )
    return build_release(inputs, bundle.folder, store, config)


@pytest.fixture(scope="session")
def showcase(
    small_bundle: SmallBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Fused pins with pictures, products without; known queries; releases "first" and "second".

    The second, which answers, lacks the last ten entities of the first.
    """
    store = ReleaseStore(tmp_path_factory.mktemp("showcase") / "store")
    _release(store, small_bundle, "first", 80)
    _release(store, small_bundle, "second", 70)
    with serving(SmallStore(store, small_bundle, "second")) as found:
        activate = found.server.releases.activate("second")
        asyncio.run_coroutine_threadsafe(activate, found.loop).result(60)
        yield found
