"""The report of an evaluation: its numbers are the data's, its texts harmless, damaged data refused."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import NAMES, hostile, made_result
from markdown_it import MarkdownIt

from cli.command_line import run
from steersman import ArtifactError, Steering
from steersman.evaluation import figures
from steersman.evaluation.arms import Subject
from steersman.evaluation.evaluate import evaluate
from steersman.evaluation.evaluation_report import (
    card_evidence,
    check_evaluation,
    evaluation_schema,
    read_evaluation,
    steering_card,
    with_evidence,
    write_evaluation_report,
)
from steersman.evaluation.evaluation_report.items import laid_over
from steersman.evaluation.evaluation_report.texts import harmless, markdown
from steersman.experts.contrast import RoutingContrast
from steersman.steering import sha256_of

VOID = {"meta", "img", "source", "br", "input"}
EVERY = 10
"""Of the places at which a value is changed, one in so many: all of them take a minute."""
DRAWN = ("whiskers", "random_draws", "heatmap", "picture")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes its time; the pictures are looked at where the page is opened."""
    for name in DRAWN:
        monkeypatch.setattr(figures, name, lambda *_, **__: b"png")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return made_result()


class Page(HTMLParser):
    """Elements, numbers and text of a page; every element must be closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, float, str]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "data":
            attrs = self.elements[-1][1]
            self.numbers.append((str(attrs["data-path"]), float(str(attrs["value"])), data))
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.elements if tag in tags]


def page_of(result: dict[str, Any], folder: Path) -> Page:
    write_evaluation_report(folder, result)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def at(value: Any, pointer: str) -> Any:
    """What a JSON pointer leads to (RFC 6901)."""
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def check_number(value: float, text: str, pointer: str) -> None:
    """What is read says what the value is, as exactly as it has digits."""
    if text.startswith("<"):
        assert 0 <= value < float(text[1:]), pointer
        return
    shown = float(text.rstrip("%").replace("−", "-"))
    digits = len(text.rstrip("%").partition(".")[2].partition("e")[0])
    scales = (
        {1.0, 100.0}
        if "%" in text or "difference" in pointer or pointer[-3:] in ("low", "igh", "p/0", "p/1")
        else {1.0}
    )
    if "minimum_detectable" in pointer:
        scales = {100.0}
    rounding = max(0.51 * 10.0**-digits, 0.006 * abs(shown) if digits or abs(shown) >= 100 else 0)
    assert any(abs(shown - scale * value) <= rounding for scale in scales), (pointer, value, text)


def pointers(result: dict[str, Any]) -> Iterator[str]:
    """Numbers that a reader must find: of every arm what counts, every difference, control, interaction."""
    for number, task in enumerate(result["tasks"]):
        here = f"/tasks/{number}"
        first = task["metrics"][0]["name"]
        cells = {c["arm"] for c in (task["factorial"] or {}).get("cells", [])}
        doses = {d["arm"] for d in task["dose_response"] or []}
        for arm in result["arms"]:
            name, escaped = arm["name"], arm["name"].replace("~", "~0").replace("/", "~1")
            alone = arm["kind"] not in ("cell", "strength")
            of_arm = task["results"].get(name, {})
            for metric in of_arm if alone else {first} & set(of_arm) if name in cells | doses else ():
                if of_arm[metric] is not None:
                    kind = "rate" if "rate" in of_arm[metric] else "mean"
                    yield from (f"{here}/results/{escaped}/{metric}/{key}" for key in (kind, "low", "high"))
            change = task["differences"].get(name, {}).get(first)
            if alone and change is not None:
                keys = ("difference", "low", "high", "p", "p_holm")
                yield from (f"{here}/differences/{escaped}/{first}/{key}" for key in keys)
        for place, _ in enumerate(task["random"] or []):
            yield from (f"{here}/random/{place}/{key}" for key in ("observed", "at_least", "mean", "p"))
        for place, _ in enumerate((task["factorial"] or {}).get("interactions", [])):
            keys = ("difference", "low", "high", "p", "p_holm")
            yield from (f"{here}/factorial/interactions/{place}/{key}" for key in keys)
        for kind in task["kinds"]:
            yield f"{here}/kinds/{kind}/items"
            yield f"{here}/kinds/{kind}/results/base/{first}/rate"


def check_page(result: dict[str, Any], page: Page) -> None:
    assert len(page.numbers) > 50
    for pointer, value, text in page.numbers:
        assert at(result, pointer) == value, pointer
        check_number(value, text, pointer)
    assert set(pointers(result)) <= {pointer for pointer, _, _ in page.numbers}


def test_every_number_of_the_page_is_that_of_the_data(result: dict[str, Any], tmp_path: Path) -> None:
    check_page(result, page_of(result, tmp_path))


def test_a_real_evaluation_fits_the_schema_and_the_page(
    subject: Subject, contrast: RoutingContrast, tmp_path: Path
) -> None:
    plan = contrast.select(top=12)
    made = evaluate(
        subject.model,
        subject.tokenizer,
        {"safer": plan},
        task="lab:refusal/test",
        side_tasks="lab:ordinary/test",
        strengths=[0.5],
        attacks={"please": "{prompt} please ."},
        instruction="refuse .",
        reverse={"safer": contrast.select(top=12, reverse=True)},
        random=2,
        control_items=4,
        limit=4,
        shown=2,
        max_new_tokens=8,
        contrast=contrast,
    )
    made.save(tmp_path / "results")
    read = read_evaluation(tmp_path / "results")
    assert read == made.to_json()
    check_page(read, Page((tmp_path / "results/report.html").read_text(encoding="utf-8")))
    plan.save_pretrained(tmp_path / "plan")
    evidence = with_evidence(tmp_path / "plan", read).evidence[0]
    assert evidence["sha256"] == sha256_of(read)


def test_the_page_can_be_heard(result: dict[str, Any], tmp_path: Path) -> None:
    page = page_of(result, tmp_path)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(attrs["scope"] in ("col", "row") for attrs in page.all("th"))
    assert all(len(attrs["alt"] or "") > 30 for attrs in page.all("img"))
    ids = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for attrs in page.all("a")} <= set(ids)
    labels = {attrs["for"] for attrs in page.all("label")}
    assert labels == {attrs["id"] for attrs in page.all("select", "input")}
    scrolling = [attrs for attrs in page.all("div") if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)
    names = [attrs["aria-label"] for attrs in scrolling]
    assert len(names) == len(set(names))


def test_text_of_files_and_models_can_do_nothing(result: dict[str, Any], tmp_path: Path) -> None:
    page = page_of(hostile(result), tmp_path)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on") or a == "style"]
    assert not page.all("iframe", "object", "form", "link", "base")
    for _, attrs in page.elements:
        for name in ("src", "href", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    words = "".join(page.text)
    assert words.count('<script>document.title="hacked"</script>') > 20
    assert not re.search("[\x00-\x08\x1b\u202a-\u202e\u2066-\u2069]", words)


def test_markdown_reads_hostile_text_as_it_is(result: dict[str, Any], tmp_path: Path) -> None:
    for name, made in (("kind", result), ("hostile", hostile(result))):
        (tmp_path / name).mkdir()
        write_evaluation_report(tmp_path / name, made)
        for file in ("report.md", "card.md"):
            text = (tmp_path / name / file).read_text("utf-8")
            tokens = MarkdownIt("commonmark").enable("table").parse(text)
            kinds = {child.type for token in tokens for child in [token, *(token.children or [])]}
            assert not kinds & {"html_inline", "html_block", "link_open", "image", "code_inline"}, file
            check_columns(text)
            assert ("table_open" in kinds) == (file == "report.md")


def check_columns(text: str) -> None:
    """Every row of a table has as many cells as its header: the parser would drop what is too much."""
    wide = 0
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (cells and wide) or cells == wide, line
        wide = cells


@given(st.text(max_size=40))
def test_markdown_of_any_text_is_that_text(text: str) -> None:
    clean = harmless(text)
    (inline,) = [t for t in MarkdownIt("commonmark").parse(f"x {markdown(clean)} x") if t.type == "inline"]
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}
    said = "".join(child.content for child in inline.children or [])
    assert said.split() == ["x", *clean.split(), "x"]


@given(
    st.lists(st.text("abcé", min_size=1, max_size=5), max_size=6),
    st.lists(st.integers(1, 4), max_size=12),
)
def test_tokens_are_laid_over_words(words: list[str], cuts: list[int]) -> None:
    text = " ".join(words)
    pieces, at_ = [], 0
    for cut in [*cuts, len(text)]:
        if text[at_ : at_ + cut]:
            pieces.append([text[at_ : at_ + cut], float(at_)])
        at_ += cut
    laid, apart = laid_over([[word, False] for word in words], pieces)
    assert apart == []
    assert ["".join(part.text for part in word.stretches) for word in laid] == words
    shifts = [part.shift for word in laid for part in word.stretches]
    assert shifts == sorted(shifts, key=lambda shift: -1.0 if shift is None else shift)


def test_tokens_that_do_not_spell_the_words_stand_alone() -> None:
    laid, apart = laid_over([["hello", True]], [["hel", 0.1], ["p", 3.0]])
    assert [(word.stretches[0].text, word.stretches[0].shift) for word in laid] == [("hello", None)]
    assert [(part.text, part.level) for part in apart] == [("hel", 1), ("p", 3)]


# ---------------------------------------------------------------- what it says


def test_the_first_words_say_effect_chance_and_cost(result: dict[str, Any], tmp_path: Path) -> None:
    words = re.sub(r"\s+", " ", "".join(page_of(result, tmp_path).text))
    found = result["tasks"][0]["differences"]["safer"]["positive"]
    assert f"{100 * found['difference']:+.0f} points (95% interval {100 * found['low']:+.0f} to" in words
    assert "None of 19 random plans of the same shape did as much as safer (p = 0.05)" in words
    assert "No side effect of safer seen on 2 side tasks (could have seen ±12 points" in words
    assert "no difference seen, could have seen ±12 points" in words
    assert "not measured under this arm" in words


def test_an_effect_that_is_gone_after_holm_is_called_unclear(result: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(result)
    changed["tasks"][0]["differences"]["safer"]["positive"] |= {"p": 0.02, "p_holm": 0.2}
    write_evaluation_report(tmp_path, changed)
    assert "would count alone, but not as one of so many arms" in (tmp_path / "report.md").read_text("utf-8")


def test_the_card_says_what_effect_cost_and_limits(result: dict[str, Any], tmp_path: Path) -> None:
    write_evaluation_report(tmp_path, result)
    text = (tmp_path / "card.md").read_text("utf-8")
    for said in ("put into the top-k: 1 (λ 1)", "kept out of the top-k: 3 (λ −0.5)", "p.jsonl", "1" * 64):
        assert said in text
    card = steering_card(result, "a/b~c")
    assert [found["arm"] for found in card["effects"]] == ["a/b~c"]
    assert {found["task"] for found in card["costs"]} == {"ordinary", "reading"}
    assert "the other direction" in card["not_measured"]
    assert "the other direction" not in steering_card(result, "safer")["not_measured"]
    assert card["evaluation"] == sha256_of(result)
    with pytest.raises(ArtifactError, match=r"no plan called 'x' \(it has: safer, a/b~c\)"):
        steering_card(result, "x")


# ---------------------------------------------------------------- evidence


def test_evidence_is_attached_once_and_changes_nothing_else(
    result: dict[str, Any], contrast: RoutingContrast, tmp_path: Path
) -> None:
    plan, folder = contrast.select(top=4), tmp_path / "plan"
    plan.save_pretrained(folder)
    with pytest.raises(ArtifactError, match="not of this plan"):
        with_evidence(folder, result)
    assert Steering.from_pretrained(folder).evidence == ()
    of_plan = copy.deepcopy(result)
    of_plan["steerings"][0]["fingerprint"] = plan.fingerprint
    for _ in range(2):
        with_evidence(folder, of_plan)
    read = Steering.from_pretrained(folder)
    assert read.fingerprint == plan.fingerprint
    assert read.evidence == (card_evidence(of_plan, "safer"),)
    assert read.provenance == plan.provenance
    effect = next(task for task in read.evidence[0]["tasks"] if task["arm"] == "safer")
    assert effect["difference"] == of_plan["tasks"][0]["differences"]["safer"]["positive"]["difference"]
    assert effect["random_p"] == 0.05
    assert (2 * (0.5 * read)).evidence == ()
    words = run("show", folder).words
    assert "refusal, safer: refused +" in words
    assert "p among random plans 0.05; 60 items" in words
    assert "reading, safer: perplexity " in words


def test_evidence_of_a_dialled_plan_says_at_which_strength(
    result: dict[str, Any], contrast: RoutingContrast, tmp_path: Path
) -> None:
    plan = contrast.select(top=4)
    plan.save_pretrained(tmp_path / "plan")
    half = 0.5 * plan
    of_half = copy.deepcopy(result)
    of_half["steerings"][1] |= {"fingerprint": half.fingerprint, "provenance": dict(half.provenance)}
    evidence = with_evidence(tmp_path / "plan", of_half).evidence
    assert Steering.from_pretrained(tmp_path / "plan").evidence == evidence
    assert {(task["arm"], task["strength"]) for task in evidence[0]["tasks"]} == {("a/b~c", 0.5)}


# ---------------------------------------------------------------- damaged, foreign, newer


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if path and path[-1] in ("provenance", "settings", "record", "scores"):
        return  # free, but for being objects
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        if not isinstance(key, int) or key < 1:
            yield from places(inside, (*path, key))


def changed_at(result: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(result)
    inside: Any = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return changed


def complaint(act: Callable[[], object]) -> str:
    """What is said where something is refused; empty where it is not."""
    try:
        act()
    except ArtifactError as error:
        return str(error)
    return ""


def test_whatever_the_schema_takes_is_shown(result: dict[str, Any], tmp_path: Path) -> None:
    """A value of another kind at any place: refused with one line that says where, or the report is made."""
    small = copy.deepcopy(result)
    small["tasks"], small["arms"] = small["tasks"][:1], small["arms"][:3]
    for part in ("results", "differences", "preferences"):
        small["tasks"][0][part] = {a: of for a, of in small["tasks"][0][part].items() if a in NAMES[:3]}
    spots = list(places(small))
    assert len(spots) > 200
    refused = []
    for number, path in enumerate(spots[::EVERY]):
        value = [None, "x", -1, [], {}, True, 0.5][number % 7]
        changed = changed_at(small, path, value)
        said = complaint(partial(check_evaluation, changed))
        if not said:
            said = complaint(partial(write_evaluation_report, tmp_path, changed))
            assert not said or "evaluation.json: not of the expected form" in said
        refused.append(bool(said))
        assert "\n" not in said
    assert sum(refused) > len(refused) / 2


def test_the_report_command(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(result), encoding="utf-8")
    assert run("report", tmp_path, "--json").json == {
        "output": str(tmp_path),
        "files": ["report.html", "report.md", "card.md"],
    }
    before = (tmp_path / "report.html").read_bytes()
    assert "report.md" in run("report", tmp_path).words
    assert (tmp_path / "report.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("card.md", "evaluation.json", "report.html", "report.md")
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"format": "steersman"}', 'not an evaluation ("format" is not "steersman-evaluation")'),
        ('{"format": "steersman-evaluation", "format_version": 2}', "upgrade steersman"),
        ('{"format": "steersman-evaluation", "format_version": 1}', "is a required property"),
        ('{"format": "steersman-evaluation", "format_version": NaN}', "NaN is not a number"),
    ],
)
def test_what_is_no_evaluation_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content, encoding="utf-8")
    done = run("report", tmp_path)
    assert done.status == 2
    assert done.remarks.count("\n") == 1
    assert words in done.remarks
    assert str(tmp_path / "evaluation.json") in done.remarks
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_a_damaged_number_is_named(result: dict[str, Any], tmp_path: Path) -> None:
    changed = changed_at(result, ("tasks", 0, "results", "base", "positive", "rate"), "much")
    (tmp_path / "evaluation.json").write_text(json.dumps(changed), encoding="utf-8")
    done = run("report", tmp_path)
    assert done.status == 2
    assert "tasks[0].results.base.positive.rate: 'much' is not of type 'number'" in done.remarks
    assert run("report", tmp_path / "nowhere").status == 2


def test_the_schema_is_one(result: dict[str, Any]) -> None:
    schema = evaluation_schema()
    check_evaluation(result)
    assert set(schema["required"]) == set(result)
