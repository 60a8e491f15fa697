"""The report: one file, no network, readable by people and by screen readers, and true to the figures."""

from __future__ import annotations

import html
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from steersman.certainty import CANNOT_TELL, NOT_SHOWN, SHOWN, p_value
from steersman.evaluation import report
from steersman.evaluation.report import (
    Chapter,
    KeyFigure,
    Report,
    findings,
    first_sight,
    percent,
    points,
    range_of,
    render_report,
    signed,
    works_both_ways,
)
from steersman.evaluation.statistics import paired_difference, random_control
from steersman.evaluation.study import Study
from steersman.evaluation.tasks import Item, Task

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects what the tests look at, and checks that every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.captions = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def all(self, *tags: str) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, attrs) for tag, attrs in self.elements if tag in tags]

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def page_of(*studies: Study, **changes: object) -> str:
    made = Report(
        title="The title",
        lead=["A first paragraph."],
        key_figures=[KeyFigure("What", "63% → 100%", "how sure")],
        caution="These experts were planted.",
        chapters=[
            Chapter(f"chapter-{n}", f"Chapter {n}", "An intro.", study) for n, study in enumerate(studies)
        ],
        commands=[("Look", "steersman describe lab:moe")],
        limits=["It is a toy."],
        facts=[("made by", "a test")],
    )
    return render_report(replace(made, **changes))


@pytest.mark.usefixtures("without_pictures")
def test_the_page_begins_with_two_answers_and_a_picture(study: Study) -> None:
    text = page_of(study, first=first_sight(study))
    start = text[text.index("<h1>") : text.index('class="lead"')]
    assert start.count("<img") == 1
    example = study.effect.examples(1)[0]
    for arm in ("base", "toward"):
        for word in example.answers[arm]:
            assert html.escape(word.text) in start
    assert example.answers["base"] != example.answers["toward"]
    assert "as it is" in start
    assert "steered" in start


def test_an_item_that_differs_comes_first(study: Study) -> None:
    example = first_sight(study).example
    assert example.outcomes["base"] != example.outcomes["toward"]


@pytest.fixture(scope="module")
def page(study: Study) -> Page:
    return Page(page_of(study, study))  # with its pictures


def test_nothing_is_asked_of_a_network(page: Page) -> None:
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attrs.get(name) or ""
            assert not value or value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:40])
    assert not page.all("script", "link", "iframe", "object", "form")
    policy = next(attrs["content"] for _, attrs in page.all("meta") if attrs.get("http-equiv"))
    assert "default-src 'none'" in str(policy)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes its time, and not every test looks."""
    for name in ("heatmap", "rates", "narrow_rates", "random_draws"):
        monkeypatch.setattr(report.figures, name, lambda *_, **__: b"png")


@pytest.mark.usefixtures("without_pictures")
def test_stylesheet_asks_nothing_either(study: Study) -> None:
    style = re.search(r"<style>(.*?)</style>", page_of(study), re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_pictures_tables_and_headings_can_be_heard(page: Page) -> None:
    pictures = page.all("img")
    assert len(pictures) == 6
    assert all(len(attrs.get("alt") or "") > 40 for _, attrs in pictures)
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(attrs.get("scope") in ("col", "row") for _, attrs in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.all("html")[0][1]["lang"] == "en"
    assert {"main", "nav", "header", "footer"} <= {tag for tag, _ in page.elements}


def test_what_scrolls_can_be_reached_and_has_a_name(page: Page) -> None:
    scrolling = [attrs for _, attrs in page.all("div") if attrs.get("class") == "scroll"]
    assert scrolling
    assert all(attrs.get("tabindex") == "0" and attrs.get("aria-label") for attrs in scrolling)


def test_ids_are_unique_and_links_lead_to_them(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    assert len(ids) == len(set(ids))
    targets = [str(attrs["href"])[1:] for _, attrs in page.all("a")]
    assert len(targets) > 4
    assert set(targets) <= set(ids)
    labelled = [attrs["aria-labelledby"] for _, attrs in page.elements if attrs.get("aria-labelledby")]
    assert set(labelled) <= set(ids)


def test_the_page_holds_the_studys_figures(page: Page, study: Study) -> None:
    words = page.words
    for arm in study.effect.arms.values():
        for found in arm.rates.values():
            assert percent(found.rate) in words
            assert range_of(found) in words
    for difference in study.effect.differences.values():
        assert points(difference) in words
    assert f"p = {p_value(study.control.p)}" in words
    assert study.choice.rule in words
    for cost in study.costs:
        assert percent(cost.rate("toward")) in words
    for example in study.effect.examples(6):
        assert example.prompt in words
    assert "planted" in words


def test_changed_words_are_marked(page: Page, study: Study) -> None:
    shown = study.effect.examples(6)
    changed = sum(word.changed for example in shown for words in example.answers.values() for word in words)
    assert changed > 0
    assert len(page.all("mark")) == 2 * changed


@pytest.mark.usefixtures("without_pictures")
def test_texts_of_models_and_tasks_are_escaped(study: Study) -> None:
    hostile = '<script>alert("x")</script>'
    items = [replace(item, content=hostile) for item in study.effect.task]
    task = Task("lab:refusal/test", items, study.effect.task.behaviour)
    arms = {
        name: replace(arm, texts=(f"{hostile} {name}",) * len(items))
        for name, arm in study.effect.arms.items()
    }
    text = page_of(
        replace(study, effect=replace(study.effect, task=task, arms=arms)), title=hostile, limits=[hostile]
    )
    page = Page(text)
    assert not page.all("script")
    assert page.words.count(hostile) > 6


def changed(study: Study, up: tuple[int, int], down: tuple[int, int], p: float) -> Study:
    """The study with differences made of (gained, lost) items of 50, and a control with about this p."""

    def difference(gained: int, lost: int):
        rest = 50 - gained - lost
        return paired_difference(
            [0] * gained + [1] * lost + [1] * rest, [1] * gained + [0] * lost + [1] * rest
        )

    draws = [1.0] * round(p * 100) + [-1.0] * (99 - round(p * 100))
    effect = replace(study.effect, differences={"toward": difference(*up), "reversed": difference(*down)})
    return replace(study, effect=effect, control=random_control(0.0, draws))


@pytest.mark.parametrize(
    ("up", "down", "p", "verdicts"),
    [
        ((20, 0), (0, 20), 0.0, [SHOWN, SHOWN]),
        ((20, 0), (1, 0), 0.0, [SHOWN, CANNOT_TELL]),
        ((1, 1), (0, 20), 0.0, [CANNOT_TELL, SHOWN]),
        ((20, 0), (0, 20), 0.5, [CANNOT_TELL, CANNOT_TELL]),
        ((0, 20), (20, 0), 0.0, [SHOWN, SHOWN]),
    ],
)
def test_findings(
    study: Study, up: tuple[int, int], down: tuple[int, int], p: float, verdicts: list[str]
) -> None:
    made = changed(study, up, down, p)
    found = findings(made)
    assert [one.verdict for one in found[:2]] == verdicts
    assert works_both_ways(made) == (verdicts == [SHOWN, SHOWN] and up[0] > up[1])
    assert all("of 99 random plans of its shape did as much" in one.figures for one in found[:2])
    assert len(found) == 2 + 2 * len(study.costs)  # costs in both directions
    assert all("cost" in one.claim and "random" not in one.figures for one in found[2:])


def test_few_random_plans_carry_nothing(study: Study) -> None:
    made = replace(changed(study, (20, 0), (0, 20), 0.0), control=random_control(1.0, [0.0] * 3))
    assert [one.verdict for one in findings(made)[:2]] == [CANNOT_TELL] * 2
    assert "fewer than 19 can show nothing" in findings(made)[0].figures
    assert not works_both_ways(made)


def test_a_small_change_measured_well_is_not_shown(study: Study) -> None:
    nothing = paired_difference([0, 1] * 400, [0, 1] * 400)
    effect = replace(study.effect, differences={"toward": nothing, "reversed": nothing})
    assert [one.verdict for one in findings(replace(study, effect=effect))[:2]] == [NOT_SHOWN] * 2


def test_numbers_as_they_are_read() -> None:
    assert [percent(x) for x in (0.0, 0.001, 0.5, 0.994, 0.9999, 1.0)] == [
        "0%",
        "0.1%",
        "50%",
        "99%",
        "99.9%",
        "100%",
    ]
    assert [signed(x) for x in (3.2, -3.2, -0.2, 0.0)] == ["+3", "−3", "0", "0"]
    assert [p_value(x) for x in (0.0002, 0.02, 0.005, 0.0512, 0.2, 1.0)] == [
        "< 0.001",
        "0.02",
        "0.005",
        "0.051",
        "0.20",
        "1.00",
    ]


@pytest.mark.usefixtures("without_pictures")
def test_an_item_of_plain_text_is_shown_as_it_is(study: Study) -> None:
    items = [Item(str(n), "1", "just a text", "a", "b", "") for n in range(len(study.effect.task))]
    task = Task("t", items, study.effect.task.behaviour)
    page = Page(page_of(replace(study, effect=replace(study.effect, task=task))))
    assert "just a text" in page.words
