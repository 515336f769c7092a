"""The report in a real browser: no complaint, no request, every figure drawn, nothing cut off, printed whole.

One headless Chromium is started for all of it and spoken to over the DevTools protocol, through two pipes.
"""

import base64
import io
import json
import os
import re
import runpy
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retemper.engine.report import write_report
from retemper.engine.report.methods import write_comparison

made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made_runs.py"))))  # the tests are no package
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"phone": 400, "desk": 1600, "sheet": 720}  # CSS pixels; a sheet of A4 within its margins
LIMIT = 600  # seconds that an answer may take, on a slow and busy machine too
LOOK = """(async () => {
  const drawn = async image => {
    await image.decode();
    const canvas = new OffscreenCanvas(200, 150), pen = canvas.getContext('2d');
    pen.drawImage(image, 0, 0, 200, 150);
    const colours = new Set(new Uint32Array(pen.getImageData(0, 0, 200, 150).data.buffer));
    const box = image.getBoundingClientRect();
    return {natural: image.naturalWidth, colours: colours.size, width: box.width, height: box.height, right: box.right};
  };
  const shown = [...document.querySelectorAll('main *, footer')].filter(e => e.innerText && e.checkVisibility());
  return {
    window: innerWidth, page: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    text: Math.min(...shown.map(e => parseFloat(getComputedStyle(e).fontSize))),
    sections: [...document.querySelectorAll('h2')].map(e => e.innerText),
    lost: [...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.hash)).length,
    cut: [...document.querySelectorAll('p, h1, h2, summary, figcaption, img')]
      .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80)),
    images: await Promise.all([...document.images].map(drawn)),
  };
})()"""


class Browser:
    """A headless Chromium with one page; `events` is all that it reported."""

    def __init__(self, home: Path) -> None:
        to_browser, self.out = os.pipe()
        self.into, from_browser = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-dev-shm-usage", f"--user-data-dir={home}"]
        # The protocol's pipes are descriptors 3 and 4; the shell puts them there.
        words = [
            "bash",
            "-c",
            f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}',
            str(CHROMIUM),
            *options,
            "about:blank",
        ]
        pipes, away = (to_browser, from_browser), subprocess.DEVNULL
        self.process = subprocess.Popen(words, pass_fds=pipes, stdout=away, stderr=away)
        os.close(to_browser)
        os.close(from_browser)
        self.events: list[dict[str, Any]] = []
        self.rest, self.number, self.session = b"", 0, ""

    def attach(self) -> None:
        """Connect to the page that the browser opened with."""
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda m: m.get("id") == self.number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _wait(self, wanted: Any) -> dict[str, Any]:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            text, found, after = self.rest.partition(b"\0")
            if not found:
                ready, _, _ = select.select([self.into], [], [], 1)
                more = os.read(self.into, 1 << 20) if ready else b""
                assert more or not ready, "Chromium is gone"
                self.rest += more
                continue
            self.rest, message = after, json.loads(text)
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                return message
        raise TimeoutError(f"Chromium gave no answer in {LIMIT} s")

    def open(self, page: Path, width: int) -> dict[str, Any]:
        """Return what `LOOK` finds on a page in a window of that width."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page.as_uri())
        self._wait(lambda m: m.get("method") == "Page.loadEventFired")
        answer = self.call("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"]["value"]

    def complaints(self) -> list[str]:
        """Return console messages of any level, exceptions, and the browser's own log."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        return [json.dumps(event["params"])[:300] for event in self.events if event["method"] in kinds]

    def requests(self) -> set[str]:
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return {event["params"]["request"]["url"][:60] for event in sent}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium: apt-get install chromium")
        pytest.skip("there is no Chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        browser.attach()
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of section: two seeds of one recipe, another run, an upper bound, a suspect."""
    root, attacks = tmp_path_factory.mktemp("report"), ("pgd20", "autoattack-fast")
    same = {"attacks": attacks, "partly": attacks[1:], "verdicts": True, "epochs": 4, "state": False}
    runs = [
        made.make_run(root / f"rslad{seed}", made.RSLAD[seed:] + made.RSLAD[:seed], method="rslad", seed=seed, **same)
        for seed in (0, 1)
    ]
    more = same | {"state": True, "checks": made.checks(suspect=True)}
    runs.append(made.make_run(root / "a_run_with_quite_a_long_name-of-a-folder", made.ABSLD, **more))
    for run in runs[1:]:
        made.add_curve(run, 2 / 255, 4 / 255, 8 / 255, 12 / 255)
    return write_report(runs, root / "page")


@pytest.fixture(scope="module", params=["phone", "desk"])
def seen(request: pytest.FixtureRequest, browser: Browser, page: Path) -> dict[str, Any]:
    return browser.open(page, WIDTHS[request.param]) | {"asked": WIDTHS[request.param]}


def test_every_section_is_there(seen: dict[str, Any]) -> None:
    for title in ("Summary", "Seeds together", "Differences on the same images", "Class by class"):
        assert title in seen["sections"]
    for title in (
        "Over the radius",
        "What is taken for what",
        "Class state over the epochs",
        "Training",
        "Can the numbers be trusted?",
    ):
        assert title in seen["sections"]
    assert "For a paper's table" in seen["sections"] and seen["lost"] == 0


def test_nothing_is_cut_off_and_the_text_is_large_enough(seen: dict[str, Any]) -> None:
    assert seen["window"] == seen["asked"]
    assert seen["page"] <= seen["window"] and seen["cut"] == []
    assert seen["text"] >= 11  # CSS pixels


def test_every_figure_is_drawn_at_the_size_it_was_made_for(seen: dict[str, Any]) -> None:
    assert len(seen["images"]) == 9
    for image in seen["images"]:
        assert image["natural"] > 0 and image["width"] > 200 and image["height"] > 100
        assert image["colours"] > 20 and image["right"] <= seen["window"]
        assert image["width"] > 0.9 * image["natural"]  # or its letters shrink


def test_the_browser_complains_of_nothing_and_fetches_nothing(seen: dict[str, Any], browser: Browser) -> None:
    assert seen["height"] > 1000 and browser.complaints() == []
    assert {url.partition(":")[0] for url in browser.requests()} == {"file", "data"}


def test_the_page_of_many_methods_fits_too(browser: Browser, tmp_path: Path) -> None:
    same = {"attacks": ("clean", "pgd20", "autoattack"), "verdicts": True, "epochs": 2, "state": False}
    for name, accuracy in (("a_method_of_quite_a_long_name", made.RSLAD), ("absld", made.ABSLD)):
        made.make_run(tmp_path / "runs" / name, accuracy, **same)
    page = write_comparison([tmp_path / "runs"], tmp_path / "page")
    for width in (WIDTHS["phone"], WIDTHS["desk"]):
        seen = browser.open(page, width)
        assert seen["page"] <= seen["window"] and seen["cut"] == [] and seen["text"] >= 11 and seen["lost"] == 0
        assert {"Accuracy", "Cost", "For a paper"} <= set(seen["sections"])
        assert all(image["colours"] > 20 and image["right"] <= width for image in seen["images"])
    assert browser.complaints() == []


def test_it_can_be_printed(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setEmulatedMedia", media="print")
    sheet = browser.open(page, WIDTHS["sheet"])
    assert sheet["page"] <= sheet["window"] and sheet["cut"] == []
    pdf = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 40


WIDE = """(async to => {
  const wide = [...document.querySelectorAll('.scroll')].find(e => e.scrollWidth > e.clientWidth + 20);
  wide.scrollLeft = to;
  const box = wide.getBoundingClientRect();
  return {x: box.right + scrollX - 4, y: box.top + scrollY, width: 3, height: box.height};
})"""


def test_a_table_that_is_cut_shows_a_shadow_at_that_side(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setEmulatedMedia", media="screen")
    browser.open(page, WIDTHS["phone"])
    light = []
    for to in (0, 10_000):
        call = {"expression": f"{WIDE}({to})", "awaitPromise": True, "returnByValue": True}
        clip = browser.call("Runtime.evaluate", **call)["result"]["value"] | {"scale": 1}
        shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        with Image.open(io.BytesIO(base64.b64decode(shot))) as image:
            light.append(np.asarray(image.convert("L")).mean())
    assert light[0] < light[1] - 8


def test_a_dark_screen_gets_a_dark_page(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.open(page, WIDTHS["desk"])
    shot = browser.call("Page.captureScreenshot", clip={"x": 0, "y": 0, "width": 1600, "height": 900, "scale": 1})
    with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as image:
        assert np.asarray(image.convert("L")).mean() < 60
    browser.call("Emulation.setEmulatedMedia", features=[])
