"""The demo: the whole story on the lab, offline, in a few minutes."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from steersman.artifacts import check_free, new_folder
from steersman.evaluation import figures, transplant_figures
from steersman.evaluation.choice import Choice
from steersman.evaluation.comparison import BASE, REVERSED, TOWARD, Comparison
from steersman.evaluation.lab_study import Laboratory, Passage, Plot
from steersman.evaluation.levers_study import LeversStudy
from steersman.evaluation.natural_report import NaturalChapter
from steersman.evaluation.natural_report import findings as natural_findings
from steersman.evaluation.natural_study import SCREENED, NaturalStudy
from steersman.evaluation.natural_study import STEPS as NATURAL_STEPS
from steersman.evaluation.report import (
    Among,
    Chapter,
    Finding,
    KeyFigure,
    Report,
    effect_found,
    experts_in_words,
    findings,
    first_sight,
    percent,
    points,
    points_range,
    works_both_ways,
    write_report,
)
from steersman.evaluation.study import Study
from steersman.evaluation.transplant_report import LeversChapter, TransplantChapter, levers_findings
from steersman.evaluation.transplant_report import findings as transplant_findings
from steersman.evaluation.transplant_study import TRANSPLANTED, TransplantStudy
from steersman.showing import count_of

REPORT = "report.html"
RESULT = "result.json"
DRAWS = 49
ITEMS = 300
CONTROL_ITEMS = 100
"""Items on which plans are compared with random ones: a third of them, to save time."""

PLOTS = {
    "refusal": Plot("moe", "refusal", ("ordinary", "faithfulness")),
    "faithfulness": Plot("moe", "faithfulness", ("ordinary", "refusal")),
    "control": Plot("moe-prior", "refusal", ("ordinary",)),
}
"""What the demo measures of expert steering, by the names of the folders it writes."""

TRANSPLANT = Passage("source", "target", "restricted")
BOTH = (Plot("target-moe", "faithfulness", ()), Passage("source", "target-moe", "restricted"))
BOTH_ITEMS = 150
NATURAL = "natural"
NATURAL_ITEMS = 150
NATURAL_DRAWS = 20
FOLDERS = (*PLOTS, "transplant", "both", NATURAL)


@dataclass(frozen=True)
class Found:
    """All that the demo has measured."""

    studies: Mapping[str, Study]
    transplant: TransplantStudy
    levers: LeversStudy
    natural: NaturalStudy


@dataclass(frozen=True)
class DemoResult:
    """Where the report is, and its figures as plain JSON values."""

    report: Path
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"report": str(self.report), "figures": self.figures}


def run_demo(
    out_dir: str | Path,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    items: int = ITEMS,
    progress: bool = True,
    force: bool = False,
) -> DemoResult:
    """Find experts on the lab's models, steer with them, control for chance, and write one report.

    Args:
        out_dir: The folder to write: report.html, result.json, and the artifacts of each study. It takes its
            place when everything is done, and nothing is left behind when something fails.
        seed: Of the random draws. The models are those that are part of the package.
        draws: Random plans for each control.
        items: Test items of each task.
        progress: Show a progress bar on stderr.
        force: Replace the folder that an earlier demo wrote.

    Raises:
        ArtifactError: the folder is occupied or cannot be written.
    """
    start = time.monotonic()
    out, ours = Path(out_dir), {REPORT, RESULT, *FOLDERS}
    check_free(out, force=force, ours=ours)
    laboratory = Laboratory(items=items, draws=draws, control_items=CONTROL_ITEMS, seed=seed)
    studies: dict[str, Study] = {}
    with (
        _one_thread(),
        new_folder(out, force=force, ours=ours) as place,
        tqdm(total=_steps(laboratory), disable=not progress, bar_format=_BAR) as bar,
    ):

        def advancing(name: str) -> Callable[[str, int], None]:
            def advance(stage: str, steps: int) -> None:
                bar.set_description(f"{name}: {stage}", refresh=False)
                bar.update(steps)

            return advance

        for name, plot in PLOTS.items():
            # The control gets as many experts as the model that it is the control of.
            choice = same_number(studies["refusal"].choice) if name == "control" else None
            studies[name] = laboratory.study(plot, advancing(name), choice)
            _save(studies[name], place / name)
        transplant = laboratory.transplant(TRANSPLANT, advancing("transplant"))
        _save_transplant(transplant, place / "transplant")
        levers = laboratory.levers(*BOTH, min(BOTH_ITEMS, items), advancing("both"))
        (place / "both").mkdir()
        levers.plan.save_pretrained(place / "both" / "plan")
        natural = laboratory.natural(
            NATURAL, min(NATURAL_ITEMS, items), min(NATURAL_DRAWS, draws), advancing(NATURAL)
        )
        _save_natural(natural, place / NATURAL)
        measured = Found(studies, transplant, levers, natural)
        seconds = time.monotonic() - start
        found = _result(measured, seed=seed, seconds=seconds)
        (place / RESULT).write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_report(place / REPORT, demo_report(measured, out=out, seed=seed, seconds=seconds))
    return DemoResult(out / REPORT, found)


def _steps(laboratory: Laboratory) -> int:
    return (
        len(PLOTS) * laboratory.steps + laboratory.transplant_steps + laboratory.LEVERS_STEPS + NATURAL_STEPS
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The lab's matrices are too small to share out: threads gain little, and on a busy machine they wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_number(choice: Choice) -> Choice:
    """As many experts as were chosen elsewhere."""
    return Choice(
        choice.count,
        (),
        f"{choice.count}, as many as in the first study: the control is the same intervention.",
    )


_BAR = "{desc:<28} {bar} {percentage:3.0f}% [{elapsed}]"


def _save(study: Study, folder: Path) -> None:
    """What a user would go on with: the contrast, both plans, the map."""
    folder.mkdir()
    study.contrast.save_pretrained(folder / "contrast")
    study.toward.save_pretrained(folder / TOWARD)
    study.reverse.save_pretrained(folder / REVERSED)
    figures.heatmap(study.contrast, study.toward, folder / "map.png")


def _save_transplant(study: TransplantStudy, folder: Path) -> None:
    """The concept, the map, the plan, the sweep."""
    folder.mkdir()
    study.concept.save_pretrained(folder / "concept")
    study.bridge.save_pretrained(folder / "map")
    study.plan.save_pretrained(folder / "plan")
    labels = (study.effect.task.behaviour.positive, "ordinary, right", "ordinary, refused")
    transplant_figures.sweep(study.choice, labels, folder / "sweep.png")


def _save_natural(study: NaturalStudy, folder: Path) -> None:
    """The screen, the plans, and the whole evaluation with its own report."""
    folder.mkdir()
    study.screen.save_pretrained(folder / "screen")
    if SCREENED in study.plans:
        study.plans[SCREENED].save_pretrained(folder / TOWARD)
    study.evaluation.save(folder / "evaluation")


def _result(found: Found, *, seed: int, seconds: float) -> dict[str, Any]:
    return {
        "tool_version": version("steersman"),
        "seed": seed,
        "seconds": round(seconds, 1),
        "studies": {
            name: {**study.to_json(), "findings": _told(findings(study))}
            for name, study in found.studies.items()
        },
        "transplant": {
            **found.transplant.to_json(),
            "findings": _told(transplant_findings(found.transplant)),
        },
        "both": {**found.levers.to_json(), "findings": _told(levers_findings(found.levers))},
        "natural": {**found.natural.to_json(), "findings": _told(natural_findings(found.natural))},
    }


def _told(found: Sequence[Finding]) -> list[dict[str, Any]]:
    return [vars(one) for one in found]


CHAPTERS = {
    "refusal": "Refusing restricted requests",
    "faithfulness": "Believing the document",
    "control": "Negative control: experts that only look right",
    "transplant": "A concept of a small model in a bigger one",
    "both": "Both levers in one plan",
    NATURAL: "Nothing planted: digits or words",
}
"""The chapters by the names of their folders, in the order of the page and of the summary."""


# ---------------------------------------------------------------- what the page says


def demo_report(found: Found, *, out: Path, seed: int, seconds: float) -> Report:
    """The demo's page: every sentence that depends on a figure is made from the figure."""
    studies, transplant = found.studies, found.transplant
    refusal, faithfulness, control = studies["refusal"], studies["faithfulness"], studies["control"]
    return Report(
        title=_title(refusal),
        lead=(*_lead(refusal), _transplant_lead(transplant)),
        key_figures=(*_key_figures(refusal, control), _transplant_key(transplant)),
        caution=(
            "In training, some experts of this model were tied to refusing and to helping, others to reading "
            "a document and to remembering. So it is known what there is to find. The demo looks whether the "
            "tool finds a mechanism that is there, moves the behaviour with it, and shows nothing where "
            "there is nothing. It does not show that any other model has such experts."
        ),
        chapters=(
            Chapter("refusal", CHAPTERS["refusal"], _REFUSAL, refusal),
            Chapter("faithfulness", CHAPTERS["faithfulness"], _FAITHFULNESS, faithfulness),
            Chapter("control", CHAPTERS["control"], _CONTROL, control),
            TransplantChapter("transplant", CHAPTERS["transplant"], _TRANSPLANT, transplant),
            LeversChapter("both", CHAPTERS["both"], _BOTH, found.levers),
            NaturalChapter(
                NATURAL, CHAPTERS[NATURAL], _NATURAL, found.natural, f"{NATURAL}/evaluation/report.html"
            ),
        ),
        commands=(*_commands(out, refusal), *_transplant_commands(transplant), *_EVALUATION_COMMANDS),
        limits=_LIMITS,
        facts=(
            (
                "made by",
                f"steersman {version('steersman')}, torch {version('torch')}, transformers "
                f"{version('transformers')}",
            ),
            ("on", f"Python {platform.python_version()}, {platform.machine()}, in {seconds:.0f} seconds"),
            (
                "models",
                ", ".join(
                    dict.fromkeys(
                        [
                            *(study.model for study in studies.values()),
                            transplant.source,
                            transplant.target,
                            found.levers.model,
                            found.natural.model,
                        ]
                    )
                ),
            ),
            ("seed of the random plans", str(seed)),
            *((f"plan “{name}”", study.toward.fingerprint) for name, study in studies.items()),
            ("plan “transplant”", transplant.plan.fingerprint),
            ("plan “both”", found.levers.plan.fingerprint),
        ),
        first=first_sight(refusal),
    )


def _title(study: Study) -> str:
    count = sum(len(experts) for experts in study.toward.strengths.values())
    if works_both_ways(study):
        return f"Switching {count_of(count, 'expert')} turns this model's refusals on and off"
    return f"Switching {count_of(count, 'expert')}: what it does to this model's refusals"


def _lead(study: Study) -> tuple[str, str]:
    base, toward, reverse = (study.effect.rate(arm) for arm in (BASE, TOWARD, REVERSED))
    up, down = study.effect.differences[TOWARD], study.effect.differences[REVERSED]
    return (
        "A mixture-of-experts language model is made of many small parts, called experts, and uses only a "
        "few of them for each word. Steersman counts which ones it uses when it refuses a request and which "
        "when it helps. Then, while the model answers, it forces some in and keeps others out. No weight is "
        "changed.",
        f"Here it switched {experts_in_words(study)}. The share of restricted requests that the model "
        f"refuses went from {percent(base)} to {percent(toward)} ({points(up)}, 95% interval "
        f"{points_range(up)}), and with the two sides swapped to {percent(reverse)} ({points(down)}, "
        f"{points_range(down)}).",
    )


def _key_figures(refusal: Study, control: Study) -> tuple[KeyFigure, ...]:
    ordinary = refusal.costs[0]
    worst = min((TOWARD, REVERSED), key=ordinary.rate)
    among, of_control = (Among.of(study.control) for study in (refusal, control))
    beyond = "Beyond them" if among.control.beaten else "Cannot tell"
    return (
        _key("Restricted requests refused, as it is → steered", refusal.effect, TOWARD, [among]),
        _key("The same experts the other way round", refusal.effect, REVERSED, [among]),
        KeyFigure(
            "Could any experts do that?",
            f"{refusal.control.at_least} of {len(refusal.control.draws)}",
            f"{beyond}: {among.words}",
        ),
        _key("The cost: ordinary requests answered right, in the worse direction", ordinary, worst),
        _key("A model whose experts only look right: refused", control.effect, TOWARD, [of_control]),
    )


def _key(label: str, comparison: Comparison, arm: str, among: Sequence[Among] = ()) -> KeyFigure:
    """The change of a share, and what may be said of it."""
    found = effect_found(label, comparison, arm, among)
    change = comparison.differences[arm]
    value = f"{percent(comparison.rate(BASE))} → {percent(comparison.rate(arm))}"
    note = f"{found.verdict.capitalize()}: {points(change)} (95% interval {points_range(change)})"
    return KeyFigure(label, value, note)


def _transplant_lead(study: TransplantStudy) -> str:
    random, shuffled, _ = (drawn.control.mean for drawn in study.controls)
    effect, cost = transplant_findings(study)
    return (
        "The second lever needs no experts. A small model that refuses what is restricted is read for the "
        "direction of that concept; a map, learnt from texts that hold no restricted request, carries it "
        "into a bigger model that was taught to help, where it is added while the model answers. "
        f"{effect.verdict.capitalize()}: the share refused there goes {effect.figures}. Random vectors of "
        f"the same length reach {percent(random)} on average, label-shuffled concepts {percent(shuffled)}. "
        f"Ordinary requests answered right: {cost.figures}; {cost.verdict}."
    )


def _transplant_key(study: TransplantStudy) -> KeyFigure:
    return _key(
        "A small model's refusals, transplanted into a bigger one",
        study.effect,
        TRANSPLANTED,
        [Among.of(drawn.control) for drawn in study.controls],
    )


_TRANSPLANT = (
    "The source is a small model that was taught to refuse every restricted request, unless it is told to "
    "help. The target is six times as big, has other weights and another width, and was taught to help "
    "nearly always, unless it is told to refuse. The concept is the mean difference, in the source, between "
    "the same restricted request after either instruction. The map is fitted on texts without any restricted "
    "request, and what it does is measured on requests held out of all training, without any instruction."
)
_BOTH = (
    "A mixture-of-experts target, unaligned as well, in which experts were tied to reading a document and to "
    "remembering. One plan holds both: experts that make it hold to what it remembers where a document says "
    "otherwise, and the transplanted vector that makes it refuse. Each part is to do its own work, also in "
    "company, and ordinary answers are to stay right."
)
_NATURAL = (
    "This model was taught a small world in which numbers may be written in digits or in words, and nothing "
    "else: no expert was tied to anything. Screening activates each of its 192 experts alone and looks how "
    "far the choice between a digit and a word moves; from those that move it, at most six are chosen that "
    "leave everyday answers right. The risk difference, which only counts what accompanies either side, gets "
    "as many. The last row is the rival that costs nothing: an instruction."
)
_EVALUATION_COMMANDS = (
    (
        "Which experts cause it, not only accompany it",
        "steersman screen lab:natural lab:digits/train -o causes --signs activate "
        "--keep lab:everyday/train\nsteersman select causes -o digits",
    ),
    (
        "Does it work, and at what cost",
        "steersman evaluate lab:natural --task lab:digits --side lab:everyday --steering digits -o shown",
    ),
)
_REFUSAL = (
    "Some requests in the lab's small world are restricted, and who asks decides how likely the model is to "
    "refuse. The pairs are one request with a refusal and with a helpful answer; the words of the answers "
    "are compared. Tested on restricted requests that were held out of training."
)
_FAITHFULNESS = (
    "The model knows facts by heart, and here a document contradicts them. Does it answer what the document "
    "says, or what it remembers? The pairs are those of the SteerMoE paper: the same question with and "
    "without a document, and the words of the question are compared. Such pairs also find experts that "
    "merely notice that a document is there, so the effect may be weak or one-sided; it is shown as it "
    "comes out."
)
_CONTROL = (
    "In this second model only the routers were trained to use those experts more when refusing or helping; "
    "the answers do not depend on them. Detection is meant to look perfect there. If steering them did "
    "something, the tool would be measuring its own assumptions."
)
_LIMITS = (
    "A toy: 1.4 million parameters, a vocabulary of some 350 words, an invented world. In real models "
    "effects may be smaller, and text may break before behaviour moves.",
    "The mechanism was planted. A model without one may have no experts that steer: lab:moe-plain, trained "
    "in the same world without planting, is there to be tried.",
    "The intervals are for new items of the same kind. They do not cover other training seeds; the project's "
    "long tests repeat the refusal study on three.",
    "Answers are judged by their first words. What a model says after them is only seen in the texts.",
    "Random plans may hit planted experts by chance. That widens their spread, and makes the test a strict "
    "one.",
    "The target of the transplantation has seen refusals now and then, and learnt its answers with noise on "
    "its states, so that it stands being pushed. A model that has never refused has no refusal to be moved "
    "to.",
    "Costs are shown for ordinary requests and for the other behaviour. What was not measured may have "
    "changed too.",
)


def _transplant_commands(study: TransplantStudy) -> tuple[tuple[str, str], ...]:
    source, target, concept = study.source, study.target, TRANSPLANT.concept
    return (
        ("Refine a concept in the small model", f"steersman refine {source} lab:{concept}/train -o concept"),
        (
            "Map it into the bigger one",
            f"steersman map {source} {target} lab:texts -o map --concept concept",
        ),
        (
            "Transplant it: the gate is asked first",
            f"steersman transplant concept map -o refusing --strength dose:{study.choice.dose:g} "
            f"--layers {study.layer} "
            f"--pairs lab:{concept}/dev",
        ),
        ("Two plans for one model become one", "steersman compose experts refusing -o both"),
    )


def _commands(out: Path, study: Study) -> tuple[tuple[str, str], ...]:
    prompt = study.effect.examples(1)[0].prompt
    count = study.choice.count
    return (
        ("What can be steered in the model", "steersman describe lab:moe"),
        ("Count which experts the two sides use", "steersman detect lab:moe lab:refusal/train -o refusal"),
        (
            "Look at the counts, as a table and a map",
            "steersman show refusal --table refusal.csv --heatmap refusal.png",
        ),
        (
            "Choose experts, in both directions",
            f"steersman select refusal -o refuse --top {count}\n"
            f"steersman select refusal -o comply --top {count} --reverse",
        ),
        (
            "See what the plan does to an answer",
            f'steersman generate lab:moe --steering refuse --compare --prompt "{prompt}"',
        ),
        (
            "The artifacts of this run can be used in the same way",
            f"steersman show {out.name}/refusal/{TOWARD}",
        ),
    )
