"""The pages of `alignsae explore` and the run report in Chromium: phone and desktop, light and dark."""

import functools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.language_model import words
from tests.test_explore import write_tokens
from tools.cli import main
from tools.explore import COLUMNS, PageHandler
from tools.exploring.pages import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)"),
]
HOSTILE = "<img src=x onerror=hostile=1>"  # with a word of the tiny model, as long as a token may be shown
SCREENS = [(width, scheme) for width in (390, 1440) for scheme in ("light", "dark")]
MOST_BYTES = 300_000
MANY = 20_000  # slots
LEAST_CONTRAST = 4.5

# Every text with the contrast (WCAG 2) of its colour with what is painted behind it, the worst first.
CONTRAST = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length === 3 ? [...n, 1] : n; };
  const over = (top, under) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * under[i]).concat(1);
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    const canvas = matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
    return layers.reverse().reduce((under, layer) => over(layer, under), canvas);
  };
  const luminance = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).map(n => n.data).join(" ")
      || element.placeholder;
    if (!text || !element.checkVisibility() || ["SCRIPT", "STYLE", "NOSCRIPT"].includes(element.tagName)) continue;
    const style = getComputedStyle(element, element.placeholder ? "::placeholder" : null), back = behind(element);
    const colour = over(parse(style.color), back), pair = [luminance(colour), luminance(back)].sort((a, b) => b - a);
    found.push([(pair[0] + .05) / (pair[1] + .05) * Number(style.opacity), element.tagName + " " + text.slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""

# What one can act on or scroll, each marked with its number.
FOCUSABLE = """() => {
  const scrolls = e => e.scrollWidth > e.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const acts = e => e.matches("a[href], button:not(:disabled), input, select, [tabindex='0']") || scrolls(e);
  const found = [...document.querySelectorAll("body *")].filter(e => acts(e) && e.checkVisibility());
  found.forEach((e, number) => { e.dataset.number = number; });
  document.activeElement.blur();
  return found.length;
}"""
FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  return [Number(e.dataset.number ?? -1), style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0];
}"""


@pytest.fixture(scope="module")
def folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with report.html and the pages of all slots; a token, a concept's answer and the run's name are hostile."""
    root = tmp_path_factory.mktemp("pages")
    run, lm = root / "a<b>&run", root / "lm"
    shutil.copytree(tiny_run / "aligned", run)
    shutil.copytree(tiny_run / "lm", lm)
    tokens = (lm / "tokenizer.json").read_text()
    for word in words()[2:8]:
        tokens = tokens.replace(f'"{word}":', f"{json.dumps(word + HOSTILE)}:")
    (lm / "tokenizer.json").write_text(tokens)
    shards = write_tokens(root / "shards")
    looked = ["--shards", str(shards), "--model", str(lm)]
    given = ["--model", str(tiny_run / "lm"), "--prompts", str(tiny_run / "prompts.jsonl")]
    assert main(["explore", "--run", str(run), *looked]) == 0
    assert main(["evaluate", "--run", str(run), "--unsupervised", str(tiny_run / "plain"), *given]) == 0
    assert main(["swap", "--run", str(run), *given, "--alphas", "1,2", "--pairs", "12"]) == 0
    swap = (run / "swap.json").read_text()
    (run / "swap.json").write_text(swap.replace('"answered": "', '"answered": "' + json.dumps(HOSTILE)[1:-1]))
    assert main(["report", "--run", str(run)]) == 0
    return run


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Where a folder is served as `explore --serve` does it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(PageHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where the run folder is served."""
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


class Screen:
    """A page of the browser, and what went wrong in it."""

    def __init__(self, browser: Any, width: int, scheme: str):
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.sizes: dict[str, int] = {}
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("requestfailed", lambda request: self.errors.append(request.url))
        self.page.on("response", self._measure)

    def _measure(self, answer: Any) -> None:
        # The body of an answer is gone once the page has moved on.
        self.sizes[answer.url] = int(answer.headers.get("content-length", 0))

    def check(self) -> None:
        """What every page must be."""
        page = self.page
        assert self.errors == []
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, "it overflows"
        ratio, text = page.evaluate(CONTRAST)[0]
        assert ratio >= LEAST_CONTRAST, f"contrast {ratio:.2f}: {text}"
        wanted, reached = page.evaluate(FOCUSABLE), set()
        for _ in range(wanted + 1):
            page.keyboard.press("Tab")
            number, outlined = page.evaluate(FOCUSED)
            assert outlined or number < 0, page.evaluate("document.activeElement.outerHTML")
            reached.add(number)
        assert reached - {-1} == set(range(wanted)), page.evaluate(
            "missing => missing.map(n => document.querySelector(`[data-number='${n}']`).outerHTML)",
            sorted(set(range(wanted)) - reached),
        )
        assert not page.evaluate("'hostile' in window") and page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize(("width", "scheme"), SCREENS, ids=lambda v: str(v))
def test_pages_of_slots(browser: Any, address: str, width: int, scheme: str) -> None:
    from playwright.sync_api import expect

    screen = Screen(browser, width, scheme)
    page = screen.page
    page.goto(f"{address}/slot-pages/index.html")
    page.wait_for_selector("#lines a")
    assert HOSTILE in page.locator("#lines").inner_text()
    assert "67 of 67 slots" in page.locator("#found").inner_text()
    screen.check()
    page.keyboard.press("/")
    page.keyboard.type("major")
    shown = page.locator("#lines tr").all_inner_texts()
    assert 0 < len(shown) < 67 and all("major" in row for row in shown)
    page.focus("#lines a[href='#1']")
    page.keyboard.press("Enter")
    expect(page.locator("#slot h2")).to_have_text("Slot 1: major")
    assert HOSTILE in page.locator("#slot").inner_text() and page.locator(".tokens").count() > 0
    screen.check()
    page.keyboard.press("j")
    expect(page.locator("#slot h2")).to_have_text("Slot 2: work")  # polling a script would be eval, which is forbidden
    page.keyboard.press("Escape")
    page.wait_for_selector("#list:not([hidden])")
    page.fill("#query", "")
    page.select_option("#kind", "concept")
    assert "3 of 67 slots" in page.locator("#found").inner_text()
    assert screen.errors == [] and max(screen.sizes.values()) < MOST_BYTES
    screen.context.close()


def test_many_slots_are_usable_at_once(browser: Any, tmp_path: Path) -> None:
    """ALIGNSAE_SLOT_PAGES names pages of `alignsae explore` to measure in place of these, within a second each; these
    have more time, since other tests may share the machine."""
    measured_pages = os.environ.get("ALIGNSAE_SLOT_PAGES")
    folder = Path(measured_pages or tmp_path / "pages")
    if not folder.exists():
        about = {"name": "many", "rows": "1", "columns": COLUMNS, "facts": [], "notes": []}
        line = [None, 0.1, 1.0, 1.0, None, None, None, " token", " other"]
        write(folder, about, (([slot, *line], {"i": slot, "c": []}) for slot in range(MANY)))
    last = max(folder.glob("data/lines-*.js")).read_text()
    slots = json.loads(last[last.index("[") : last.rindex("]") + 1])[-1][0] + 1
    with served(folder) as address:
        screen, seconds = Screen(browser, 1440, "light"), {}
        began = time.perf_counter()

        def note(what: str) -> None:
            nonlocal began
            now = time.perf_counter()
            seconds[what], began = now - began, now

        screen.page.goto(address, wait_until="commit")
        screen.page.wait_for_selector("#lines a")
        note("the table is there")
        screen.page.fill("#query", str(slots - 1))
        screen.page.wait_for_selector(f"#lines a[href='#{slots - 1}']")
        note("a search has found the last slot")
        screen.page.click(f"#lines a[href='#{slots - 1}']")
        screen.page.wait_for_selector("#slot h2")
        note("its page is open")
        screen.page.keyboard.press("Escape")
        screen.page.fill("#query", "")
        began = time.perf_counter()
        screen.page.click("th button[data-column='4']")
        screen.page.wait_for_selector("th[aria-sort='descending']")
        note("all are sorted by their largest activation")
        screen.context.close()
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    measured = ", ".join(f"{what} {took:.2f} s" for what, took in seconds.items())
    sys.stdout.write(f"{slots:,} slots, largest file {largest:,} bytes: {measured}\n")
    assert screen.errors == [] and largest < MOST_BYTES and max(seconds.values()) < (1.0 if measured_pages else 10.0)


@pytest.mark.parametrize(("width", "scheme"), SCREENS, ids=lambda v: str(v))
def test_report(browser: Any, address: str, width: int, scheme: str) -> None:
    from playwright.sync_api import expect

    screen = Screen(browser, width, scheme)
    page = screen.page
    page.goto(f"{address}/report.html")
    screen.check()
    assert HOSTILE in page.locator("main").inner_text()
    for link in page.locator("nav a").all():
        target = link.get_attribute("href")
        assert target == "slot-pages/index.html" or page.locator(target).count() == 1, target
    page.click("text=All slots")
    page.wait_for_selector("#lines a")
    page.go_back()
    page.click("main td a")
    expect(page.locator("#slot h2")).to_have_text("Slot 0: city")
    assert screen.errors == []
    screen.context.close()
