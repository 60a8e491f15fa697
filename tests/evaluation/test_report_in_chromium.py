"""The report as a reader has it: opened from disk in a real Chromium, which Playwright drives."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_results import DRAWN, hostile, made_result

from steersman.evaluation import figures
from steersman.evaluation.evaluation_report import write_evaluation_report
from steersman.evaluation.report import Report, first_sight, render_report
from steersman.evaluation.study import Study

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

PHONE = 360
CONTRAST = 4.5
"""Least contrast of text to what is behind it (WCAG 2.2, 1.4.3)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return made_result()


@pytest.fixture(scope="module")
def report(result: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_evaluation_report(folder, result)
    return folder / "report.html"


class Opened:
    """A page with all that it said and asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def shown(self) -> list[int]:
        """Numbers of the items that are visible."""
        return self.page.evaluate(
            "[...document.querySelectorAll('.item')].flatMap((e, i) => e.checkVisibility() ? [i] : [])"
        )

    def control(self, label: str) -> Any:
        """A control of the filters by what it is called."""
        return self.page.locator("#filters").get_by_label(label)

    def status(self) -> str:
        return self.page.get_by_role("status").inner_text()


def test_the_demos_first_phone_screen_has_two_answers_and_a_picture(
    browser: Any, study: Study, tmp_path: Path
) -> None:
    """Side by side, and large enough to be read, before anybody scrolls."""
    page = Report("Switching experts", ["A lead."], [], "", [], [], [], [], first_sight(study))
    (tmp_path / "report.html").write_text(render_report(page), encoding="utf-8")
    opened = Opened(browser, tmp_path / "report.html", viewport={"width": PHONE, "height": 740})
    places = [
        opened.page.locator(f".first {what}").nth(number).bounding_box()
        for what, number in ((".sides > div", 0), (".sides > div", 1), ("img", 0))
    ]
    base, steered, picture = places
    assert base["y"] == steered["y"]
    assert base["x"] + base["width"] < steered["x"]
    assert all(place["x"] >= 0 and place["x"] + place["width"] <= PHONE for place in places)
    assert all(place["y"] + place["height"] <= 740 for place in places)
    assert picture["width"] > 0.8 * PHONE
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE
    opened.page.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report, viewport={"width": 1200, "height": 900})
    yield opened
    opened.page.close()


def at(value: Any, pointer: str) -> Any:
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def test_it_asks_for_nothing_and_complains_of_nothing(opened: Opened, report: Path) -> None:
    assert [url for url in opened.asked if not url.startswith("data:image/png;base64,")] == [report.as_uri()]
    assert opened.said == []
    widths = opened.page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 6
    assert min(widths) > 300


def test_the_numbers_on_the_page_are_those_of_the_data(opened: Opened, result: dict[str, Any]) -> None:
    found = opened.page.evaluate(
        "[...document.querySelectorAll('data')].map(e => [e.dataset.path, e.value, e.textContent])"
    )
    assert len(found) > 300
    assert all(at(result, pointer) == float(value) for pointer, value, _ in found)
    rates = {pointer: text for pointer, _, text in found if pointer.endswith("/positive/rate")}
    assert len(rates) > 15
    assert all(abs(float(text.rstrip("%")) - 100 * at(result, p)) <= 0.51 for p, text in rates.items())


def test_filters_show_what_they_say(opened: Opened, result: dict[str, Any]) -> None:
    page, shown = opened.page, [item for task in result["tasks"] for item in task["shown"]]
    every = list(range(len(shown)))
    assert opened.shown() == every
    assert opened.status() == f"{len(shown)} of {len(shown)} items shown"
    opened.control("Task").select_option(label="About ordinary")
    assert opened.shown() == every[4:]
    opened.control("Category").select_option("weapons")
    assert opened.shown() == every[4:6]
    assert opened.status() == f"2 of {len(shown)} items shown"
    page.get_by_role("button", name="Show all").click()
    assert opened.shown() == every
    for choice, wanted in (("changed", True), ("same", False)):
        opened.control("Side").select_option(choice)
        moved = [_moved(item) for item in shown]
        assert opened.shown() == [n for n in every if moved[n] == wanted]
    opened.control("Side").select_option("changed")
    opened.control("Arm").select_option(label="prompt")
    assert opened.shown() == [n for n in every if _moved(shown[n], "prompt")]
    seen = page.evaluate(
        "[...new Set([...document.querySelectorAll('.answer')].filter(e => e.checkVisibility())"
        ".map(e => e.querySelector('h5 bdi').innerText))]"
    )
    assert seen == ["base", "prompt"]
    page.get_by_role("button", name="Show all").click()
    opened.control("Text").fill("NUMBER 2")
    assert opened.shown() == [2, 6]
    opened.control("Text").fill("nothing has this")
    assert opened.shown() == []
    assert page.locator("h3", has_text="About ordinary").last.is_hidden()
    assert opened.said == []


def _moved(item: dict[str, Any], arm: str | None = None) -> bool:
    sides = {name: answer["outcome"] for name, answer in item["answers"].items()}
    return any(side != sides["base"] for name, side in sides.items() if arm in (None, name))


def test_the_keyboard_reaches_the_controls(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the results"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") > 0
    page.keyboard.press("Enter")
    assert page.url.endswith("#first")
    reached = []
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or reached[-1] == "BODY"
        if reached[-1] == "filter-reset":
            break
    names = ["task", "outcome", "kind", "arm", "search", "reset"]
    assert reached[-6:] == [f"filter-{name}" for name in names]
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("number 1")
    assert opened.shown() == [1, 5]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert len(opened.shown()) == 8


def test_what_a_screen_reader_needs_is_there(opened: Opened) -> None:
    page = opened.page
    unnamed = page.evaluate(
        """[...document.querySelectorAll("select, input, button, a, img, [role=region], [role=group], nav")]
        .filter(e => !(e.labels?.length || e.ariaLabel || e.alt || e.innerText.trim()))
        .map(e => e.outerHTML)"""
    )
    assert unnamed == []
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(e => +e.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for role in ("main", "navigation", "banner", "contentinfo"):
        assert page.get_by_role(role).count() == 1
    tables = page.evaluate(
        "[...document.querySelectorAll('table')].map(t => t.caption?.textContent.trim() ?? '')"
    )
    assert len(tables) > 8
    assert all(tables)
    snapshot = page.locator("#filters").aria_snapshot()
    assert 'combobox "Task"' in snapshot
    assert 'searchbox "Text"' in snapshot


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(browser: Any, report: Path, scheme: str) -> None:
    page = Opened(browser, report, color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    faint = page.evaluate(LEAST_CONTRAST, CONTRAST)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    assert faint == []
    assert (light == "rgb(244, 246, 248)") == (scheme == "light")


LEAST_CONTRAST = """least => {
  const parse = c => (c.match(/[\\d.]+/g) ?? []).map(Number);
  const shine = c => { const [r, g, b] = c.map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
      !["SCRIPT", "OPTION", "SELECT"].includes(e.tagName) &&
      [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).flatMap(e => {
    const [a, b] = [shine(parse(getComputedStyle(e).color)), shine(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    return ratio < least ? [`${ratio.toFixed(2)} ${e.tagName} ${e.innerText.slice(0, 40)}`] : [];
  });
}"""


def test_it_fits_a_phone(browser: Any, report: Path) -> None:
    page = Opened(browser, report, viewport={"width": PHONE, "height": 740}).page
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE
    beyond = page.evaluate(
        "[...document.querySelectorAll('body *')]"
        ".filter(e => e.checkVisibility() && !e.closest('.scroll, .skip')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    page.close()
    assert beyond == []


def test_without_scripts_and_on_paper_all_is_there(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    items = page.locator(".item")
    assert items.count() == 8
    assert all(item.is_visible() for item in items.all())
    assert page.locator("#filters").is_hidden()
    context.close()
    page = Opened(browser, report).page
    page.emulate_media(media="print")
    assert page.locator("#filters").is_hidden()
    assert page.locator(".item").first.is_visible()
    page.close()


def test_hostile_text_does_nothing(
    browser: Any, result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in DRAWN:  # looked at above
        monkeypatch.setattr(figures, name, lambda *_, **__: b"")
    write_evaluation_report(tmp_path, hostile(result))
    opened = Opened(browser, tmp_path / "report.html", viewport={"width": PHONE, "height": 740})
    page = opened.page
    assert opened.said == []
    assert {url for url in opened.asked if not url.startswith("data:")} == {
        (tmp_path / "report.html").as_uri()
    }
    assert "<script>" in page.title()
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE
    assert re.search("\ufffdgnitset\ufffd", page.locator(".item").first.inner_text())
    opened.control("Text").fill("<script>document.title")
    assert len(opened.shown()) == 8
    page.close()
