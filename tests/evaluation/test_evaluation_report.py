"""The report of an evaluation: its numbers are the data's, its texts harmless, damaged data refused."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import DRAWN, hostile, made_result
from markdown_it import MarkdownIt

from steersman import ArtifactError
from steersman.evaluation import figures
from steersman.evaluation.arms import Subject
from steersman.evaluation.concluded import concluded
from steersman.evaluation.evaluate import evaluate
from steersman.evaluation.evaluation_report import (
    read_evaluation,
    steering_card,
    with_evidence,
    write_evaluation_report,
)
from steersman.evaluation.evaluation_report.items import laid_over
from steersman.evaluation.evaluation_report.numbers import detectable
from steersman.evaluation.evaluation_report.place import Place, plain
from steersman.evaluation.evaluation_report.texts import harmless, markdown
from steersman.experts.contrast import RoutingContrast
from steersman.steering import sha256_of

VOID = {"meta", "img", "source", "br", "input"}


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
    for task in read["tasks"]:
        for arm in read["arms"][1:]:
            change = task["differences"].get(arm["name"], {}).get(task["metrics"][0]["name"])
            if change and arm["kind"] != "cell":
                assert change["verdict"] == concluded(task, arm)
                # Two random plans can show nothing.
                assert (
                    task["role"] == "side"
                    or arm["steering"] is None
                    or change["verdict"] != "shown"
                    or (arm["kind"] == "prompt+steered")
                )
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
    assert "Shown: safer raises “refused” (About refusal) from" in words
    assert (
        "Shown: safer moves d (how much likelier the positive answer is, log-odds) further up than" in words
    )
    assert "random plans of its shape move it either way: 0 of 19 did as much (p = 0.05)" in words
    assert "Side effects of safer. Cannot tell: About ordinary +" in words
    assert "cannot tell: the interval holds 0 and reaches beyond ±5 points, so many items show ±12" in words
    assert "cannot tell: not measured under this arm" in words


def some_verdicts(result: dict[str, Any], folder: Path) -> dict[str, str]:
    """What each of the readings of an evaluation says, in one line each."""
    folder.mkdir()
    page = "".join(page_of(result, folder).text)
    texts = {"report.html": page}
    texts |= {name: (folder / name).read_text("utf-8") for name in ("report.md", "card.md")}
    return {name: re.sub(r"\s+", " ", text.replace("\\", "")) for name, text in texts.items()}


COMFORT = re.compile(
    r"none seen|no side effect|no difference (seen|in)|shows no difference|None of \d|do(es)? no more than",
    re.IGNORECASE,
)
"""What must not be said where nobody can tell."""


def test_too_few_random_plans_show_nothing(result: dict[str, Any], tmp_path: Path) -> None:
    """However clear the change: 3 plans can give p = .25 at the least."""
    changed = copy.deepcopy(result)
    changed["tasks"][0]["random"][0] |= {"draws": [0.1, 0.2, 0.3], "at_least": 0, "p": 0.25}
    for name, text in some_verdicts(changed, tmp_path / "few").items():
        assert "0 of 3 did as much (p = 0.25), and fewer than 19 can show nothing" in text, name
        assert "Cannot tell: safer and “refused”" in text, name
        assert not COMFORT.search(text), (name, COMFORT.search(text))


def test_random_plans_that_do_as_much_are_no_comfort(result: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(result)
    changed["tasks"][0]["random"][0] |= {"at_least": 4, "p": 0.25}
    for name, text in some_verdicts(changed, tmp_path / "many").items():
        assert "random plans of its shape move it either way: 4 of 19 did as much (p = 0.25)." in text, name
        assert "Cannot tell whether safer moves d" in text, name
        assert "clear of 0, but of the random plans 4 of 19 did as much" in text, name
    # As steersman once counted: those alone that do as much the same way.
    changed["tasks"][0]["random"][0] |= {"observed": 0.2, "draws": [-0.9, 0.1, 0.3], "at_least": 1, "p": 0.5}
    for name, text in some_verdicts(changed, tmp_path / "one-sided").items():
        assert "of its shape move it up: 1 of 3 did as much (one-sided p = 0.50)" in text, name
        assert ("p, one-sided" in text) == (name != "card.md"), name
    changed["tasks"][0]["random"] = None
    for name, text in some_verdicts(changed, tmp_path / "none").items():
        assert "clear of 0, but no random plans were run beside it" in text, name


def side(result: dict[str, Any], difference: float, low: float, high: float, p: float) -> dict[str, Any]:
    """With this difference of the arm `safer` in the side task of rates."""
    changed = copy.deepcopy(result)
    found = changed["tasks"][1]["differences"]["safer"]["positive"]
    found |= {"difference": difference, "low": low, "high": high, "minimum_detectable": 0.72}
    found |= {"p": p, "p_holm": p}
    return changed


def test_a_wide_interval_is_no_absence_of_side_effects(result: dict[str, Any], tmp_path: Path) -> None:
    changed = side(result, -0.25, -0.97, 0.6, 0.4)
    for name, text in some_verdicts(changed, tmp_path / "wide").items():
        assert "−25 points (95% interval −97 to +60" in text, name
        assert "Cannot tell: About ordinary −25" in text, name
        assert "so many items show ±72 points" in text, name
        assert not COMFORT.search(text), (name, COMFORT.search(text))


def test_a_least_difference_of_all_there_is_is_none(result: dict[str, Any]) -> None:
    metric = result["tasks"][1]["metrics"][0]["name"]
    for least, said in ((0.72, "±72 points"), (0.99, "±99 points"), (0.9951, ""), (0.99796, ""), (1.2, "")):
        task = {"minimum_detectable": {metric: least}}
        assert plain(detectable(Place(task), metric, Place(None))) == said


def test_a_side_effect_within_the_margin_is_not_shown(result: dict[str, Any], tmp_path: Path) -> None:
    for name, text in some_verdicts(side(result, 0.003, -0.02, 0.03, 0.8), tmp_path / "narrow").items():
        assert "Not shown: About ordinary +0.3 points" in text, name
        assert "inside ±5 points" in text, name
    for name, text in some_verdicts(side(result, -0.11, -0.16, -0.06, 0.001), tmp_path / "clear").items():
        assert "Shown: About ordinary −11 points (95% interval −16 to −6" in text, name


def test_a_mean_has_no_margin(result: dict[str, Any], tmp_path: Path) -> None:
    """Of nats, perplexities or log-odds nobody has said what counts as none: not shown is never said."""
    changed = copy.deepcopy(result)
    found = changed["tasks"][2]["differences"]["safer"]["perplexity"]
    found |= {"difference": 0.001, "low": -0.01, "high": 0.01, "p": 0.9, "p_holm": 0.9}
    for name, text in some_verdicts(changed, tmp_path / "mean").items():
        assert "About reading +0.001 (95% interval −0.01 to +0.01; p = 0.90" in text, name
        assert "Not shown: About reading" not in text, name


def without_plans(result: dict[str, Any]) -> dict[str, Any]:
    """The base and an instruction alone."""
    made = copy.deepcopy(result)
    made |= {"steerings": [], "experts": None}
    made["arms"] = [arm for arm in made["arms"] if arm["name"] in ("base", "prompt")]
    for task in made["tasks"]:
        nothing = dict.fromkeys(("random", "dose_response", "factorial", "preferences"))
        task |= {**nothing, "shown": [], "kinds": {}}
        for part in ("results", "differences"):
            task[part] = {arm: task[part][arm] for arm in ("base", "prompt") if arm in task[part]}
    return made


def test_without_a_plan_the_model_is_what_it_is_about(result: dict[str, Any], tmp_path: Path) -> None:
    page = page_of(without_plans(result), tmp_path)
    words = re.sub(r"\s+", " ", "".join(page.text))
    assert "What lab:moe does" in words
    assert "base: “refused” (About refusal) " in words
    assert "Shown: prompt raises “refused” (About refusal) from" in words
    assert "random plan" not in words.partition("Words")[0]
    assert "no plan" in (tmp_path / "card.md").read_text("utf-8")


def test_figures_without_intervals_are_shown_without(result: dict[str, Any], tmp_path: Path) -> None:
    """As of items that are all one group: there is no interval and no p."""
    made = copy.deepcopy(result)
    nothing = {"low": None, "high": None, "p": None, "p_holm": None, "minimum_detectable": None}
    for figure in [of["positive"] for of in made["tasks"][0]["results"].values()]:
        figure |= {"low": None, "high": None}
    for change in [of["positive"] for of in made["tasks"][0]["differences"].values()]:
        change |= {**nothing, "bootstrap": [None, None]}
    made["tasks"][0]["random"][0] |= {"draws": [1.0], "standard_deviation": None}
    words = "".join(page_of(made, tmp_path).text)
    assert "Cannot tell: safer and “refused” (About refusal): +" in words
    assert "points; how sure that is cannot be told." in words
    assert "None" not in words.replace("None of", "")


def test_an_effect_that_is_gone_after_holm_is_called_unclear(result: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(result)
    changed["tasks"][0]["differences"]["safer"]["positive"] |= {"p": 0.02, "p_holm": 0.2}
    write_evaluation_report(tmp_path, changed)
    assert "would count alone, but not as one of so many arms" in (tmp_path / "report.md").read_text("utf-8")


PAIRS = {"kind": "pairs", "name": "people.jsonl", "sha256": "e" * 64}
TEXTS = {"kind": "texts", "name": "wiki.txt", "sha256": "f" * 64}
CONCEPT = {"method": "mean_difference", "position": "last", "model": "small", "from": [PAIRS]}


@pytest.mark.parametrize(
    "made",
    [
        {"made": "concept", "strength": "1", "concept": CONCEPT},
        {"made": "transplant", "concept": CONCEPT, "map": {"source": "small", "from": [TEXTS]}},
        {"made": "composed", "from": [{"fingerprint": "1", "made": "selection", "from": [PAIRS]}, TEXTS]},
        {
            "made": "scaled",
            "factor": 0.5,
            "from": [{"fingerprint": "1", "made": "concept", "concept": CONCEPT}],
        },
    ],
    ids=lambda made: made["made"],
)
def test_the_card_names_the_files_behind_a_plan(
    result: dict[str, Any], tmp_path: Path, made: dict[str, Any]
) -> None:
    changed = copy.deepcopy(result)
    changed["steerings"][0]["provenance"] = made
    write_evaluation_report(tmp_path, changed)
    text = (tmp_path / "card.md").read_text("utf-8").partition("## What it does")[0]
    said = {"concept": "made of a concept", "transplant": "made by transplant"}
    assert said.get(made["made"], f"plan{'s' if made['made'] == 'composed' else ', scaled'}") in text
    assert "people.jsonl" in text
    assert "e" * 64 in text
    assert ("f" * 64 in text) == ("wiki" in str(made))


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
