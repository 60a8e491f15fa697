"""The demo on a model of real language: a concept tuned in it, a conversation, and its experts once carved.

Nothing is planted: what is shown is what is in the model. It needs no data but the model's own checkpoint.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from tqdm import tqdm

from steersman.artifacts import check_free, new_folder
from steersman.certainty import CANNOT_TELL, Control, controls_in_words
from steersman.concepts.refinement import refine_concept
from steersman.errors import ModelError
from steersman.evaluation import model_demo_data as data
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.report import Finding, KeyFigure, Report, both_themes, signed, write_report
from steersman.evaluation.screening.screen import screen_experts
from steersman.evaluation.screening.sizes import SizeSweep, sweep_sizes
from steersman.evaluation.tuning.figures import curve, effect_and_cost
from steersman.evaluation.tuning.result import Tuning
from steersman.evaluation.tuning.tuning import tune
from steersman.experts.causal import CausalScreen
from steersman.lab.carved_model import Cut, why_not
from steersman.lab.carving import carve
from steersman.models.loading import load_model
from steersman.pairs import load_pairs
from steersman.showing import count_of
from steersman.texts import load_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steersman.steering import Steering

REPORT, RESULT = "report.html", "result.json"
CONCEPT, PLAN, TUNING, MOE, SCREEN = "concept", "plan", "tuning", "moe", "screen"
OURS = {REPORT, RESULT, CONCEPT, PLAN, TUNING, MOE, SCREEN}
CONVERSATION = (
    "Tell me about volcanoes.",
    "What should I eat for breakfast?",
    "Who wrote Hamlet?",
    "How do I learn to swim?",
)
"""Asked of nobody before: neither a pair nor an item."""
SPOKEN = 48
"""Tokens of an answer in the conversation."""
COST = "kl <= 0.5"
DOSES = (0.15, 0.25, 0.35)
CONTROLS = 19
TEXT_TOKENS = 72
"""Tokens of each of the model's own answers that it is carved on."""
CARVED_TOKENS = 8192
EXPERTS, TOP_K = 32, 24
SWEPT_ITEMS = 16


@dataclass(frozen=True)
class Talk:
    """One question, and the answer of the model as it is and steered."""

    prompt: str
    base: str
    steered: str


def run_model_demo(
    model_name: str, out_dir: str | Path, *, seed: int = 0, progress: bool = True, force: bool = False
) -> dict[str, Any]:
    """Tune a concept in a dense chat model, talk to it, carve it into experts and screen those; one report.

    Args:
        model_name: A checkpoint folder or Hub name of a small dense model with a chat template.
        out_dir: The folder to write: report.html, result.json, and every artifact. It takes its place when
            everything is done.
        seed: Of every random choice.
        progress: Show a progress bar on stderr.
        force: Replace the folder that an earlier demo wrote.

    Returns:
        What result.json holds: {report, figures}.

    Raises:
        ModelError: the model has no chat template, or cannot be carved.
        ArtifactError: the folder is occupied or cannot be written.
    """
    start, out = time.monotonic(), Path(out_dir)
    check_free(out, force=force, ours=OURS)
    model, tokenizer = load_model(model_name)
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{model_name}: has no chat template, and this demo is a conversation")
    if reason := why_not(model.config):
        raise ModelError(f"{model_name}: {reason}")
    Cut.of(model.config, EXPERTS, TOP_K, None)
    with (
        new_folder(out, force=force, ours=OURS) as place,
        tqdm(total=6, disable=not progress, bar_format=_BAR) as bar,
    ):

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update(1)

        bar.set_description("refining a concept")
        pairs = load_pairs(data.pairs())
        concept = refine_concept(model, tokenizer, pairs, position="target_mean")
        concept.save_pretrained(place / CONCEPT)
        step("tuning it")
        layers = range(len(concept.layers) // 5, len(concept.layers) - 1)
        tuned = tune(
            model,
            tokenizer,
            concept,
            task=data.pirates(),
            keep=data.ordinary(),
            cost=COST,
            layers=[concept.layers[place] for place in layers][::2],
            doses=DOSES,
            controls=CONTROLS,
            answer_controls=CONTROLS,
            dev_items=16,
            cost_items=16,
            seed=seed,
            progress=progress,
        )
        tuned.save(place / TUNING)
        step("talking to it")
        talk = conversation(model, tokenizer, tuned.steering)
        if tuned.steering is not None:
            tuned.steering.save_pretrained(place / PLAN)
        step("listening to it")
        texts = spoken(model, tokenizer)
        step("carving it into experts")
        card = carve(
            model,
            tokenizer,
            [load_texts(texts)],
            place / MOE,
            experts=EXPERTS,
            top_k=TOP_K,
            tokens=CARVED_TOKENS,
            seed=seed,
            progress=progress,
        )
        step("screening its experts")
        screen, sweep = _screened(place / MOE, seed, progress)
        screen.save_pretrained(place / SCREEN)
        step("writing the report")
        seconds = time.monotonic() - start
        found = {
            "report": str(out / REPORT),
            "figures": {
                "seconds": seconds,
                "model": model_name,
                "tuning": tuned.to_json(),
                "conversation": [vars(one) for one in talk],
                "carved": {key: value for key, value in card.items() if key != "layers"},
                "screen": {"found": screen.found, "reason": screen.reason},
                "experts": None if sweep is None else sweep.to_json(),
                "findings": [vars(one) for one in [*_tuned_found(tuned), *_experts_found(screen, sweep)]],
            },
        }
        (place / RESULT).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        write_report(place / REPORT, _report(model_name, tuned, talk, card, screen, sweep, seconds))
    return found


_BAR = "{desc:<28} {bar} {percentage:3.0f}% [{elapsed}]"


def conversation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Steering | None
) -> list[Talk]:
    """Each question of the conversation, answered by the model as it is and under a plan."""
    subject = Subject(model, tokenizer, max_new_tokens=SPOKEN)
    contents = [[{"role": "user", "content": prompt}] for prompt in CONVERSATION]
    base, steered = (subject.condition(Arm("", one)).answers(contents) for one in (None, plan))
    return [Talk(*three) for three in zip(CONVERSATION, base, steered, strict=True)]


def spoken(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Chats in the model's own words: what it says to everything that is asked here."""
    subject = Subject(model, tokenizer, max_new_tokens=TEXT_TOKENS)
    contents = [[{"role": "user", "content": prompt}] for prompt in data.prompts()]
    answers = subject.condition(Arm("", None)).answers(contents)
    return [
        {"messages": [*content, {"role": "assistant", "content": answer}]}
        for content, answer in zip(contents, answers, strict=True)
        if answer
    ]


def _screened(folder: Path, seed: int, progress: bool) -> tuple[CausalScreen, SizeSweep | None]:
    """The screen of the carved model, and how far its sets go beside random ones; None where it has none."""
    moe, tokenizer = load_model(str(folder))
    task = data.numerals()
    screen = screen_experts(
        moe,
        tokenizer,
        task,
        signs="deactivate",
        choose="rounds",
        exact_runs=24,
        at_most=6,
        seed=seed,
        progress=progress,
    )
    rankings = {}
    for direction, chosen in screen.sets.items():
        if chosen.picks:
            rankings[direction] = [(pick.layer, pick.expert, pick.strength) for pick in chosen.picks]
    if not rankings:
        return screen, None
    sizes = sorted({len(ranking) for ranking in rankings.values()})
    sweep = sweep_sizes(
        moe,
        tokenizer,
        task,
        rankings,
        sizes=sizes,
        kinds=("deactivated",),
        draws=CONTROLS,
        limit=SWEPT_ITEMS,
        seed=seed + 1,
        progress=progress,
    )
    return screen, sweep


# ---------------------------------------------------------------- what it says


def _tuned_found(tuned: Tuning) -> list[Finding]:
    claim = "a concept that was tuned on development questions changes what the model says to others"
    found = tuned.confirmed
    if found is None:
        return [Finding(claim, CANNOT_TELL, tuned.why_none)]
    figures = (
        f"log-odds of a pirate's first word {signed(found.effect.mean, 2)} nats "
        f"(95% interval {signed(found.effect.low, 2)} to {signed(found.effect.high, 2)}); "
        f"{_beside(found.control)}; "
        + "; ".join(
            f"{name} {cost.value:.2f}, at most {cost.upper:.2f}" for name, cost in found.costs.items()
        )
    )
    findings = [Finding(claim, found.verdict, figures)]
    if found.answers is not None:
        told = found.answers
        figures = f"{told['base']:.0%} → {told['steered']:.0%} of {told['items']} answers"
        findings.append(Finding("and the words of its answers", told["verdict"], figures))
    return findings


def _experts_found(screen: CausalScreen, sweep: SizeSweep | None) -> list[Finding]:
    claim = "experts of the carved model decide between digits and words"
    if sweep is None:
        return [Finding(claim, CANNOT_TELL, screen.reason)]
    return [
        Finding(
            f"{claim}: {count_of(row['experts'], 'expert')} kept out, {row['direction']}",
            row["verdict"],
            f"{signed(row['change'], 2)} nats; "
            + controls_in_words(
                Control(row["draws"], row["p"]), row["as_far"], "random sets of their layers"
            ),
        )
        for row in sweep.rows()
    ]


def _beside(control: Any) -> str:
    if control is None:
        return "no controls"
    return controls_in_words(
        Control(len(control.draws), control.p), control.at_least, "tuned shuffled concepts"
    )


@dataclass(frozen=True)
class _Page:
    """A chapter of findings, pictures, talk and a table."""

    id: str
    title: str
    intro: str
    findings: Sequence[Finding]
    pictures: Sequence[tuple[str, Markup]] = ()
    talk: Sequence[Talk] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def content(self) -> dict[str, Any]:
        """What its template shows."""
        return {"template": "model.html.jinja", **vars(self)}


def _report(
    model: str,
    tuned: Tuning,
    talk: Sequence[Talk],
    card: Mapping[str, Any],
    screen: CausalScreen,
    sweep: SizeSweep | None,
    seconds: float,
) -> Report:
    found, experts = _tuned_found(tuned), _experts_found(screen, sweep)
    chosen = "nothing passed" if tuned.chosen is None else tuned.chosen.candidate.in_words()
    pictures: list[tuple[str, Callable[..., bytes]]] = [
        ("Effect against cost, every candidate", effect_and_cost),
        ("Effect by layer and dose", curve),
    ]
    return Report(
        title="A model of real language, steered",
        lead=(
            f"{Path(model).name} was trained by others, and nothing was planted in it. A concept, talking "
            "like a pirate, was read off forty pairs of sentences; where in the model to add it, and how "
            "much of it, was searched on development questions at a bounded cost, and confirmed on others.",
        ),
        key_figures=[
            KeyFigure("Where and how hard", chosen, f"of {count_of(len(tuned.tried), 'candidate')}; {COST}"),
            *(KeyFigure(one.claim, one.verdict, one.figures) for one in [*found, *experts]),
        ],
        caution="",
        chapters=(
            _Page("talk", "A conversation", "The same questions, as it is and steered.", (), talk=talk),
            _Page(
                "tuning",
                "Where to steer, and how hard",
                "Every layer and dose of a grid. What was chosen is confirmed once on questions that chose "
                "nothing, beside label-shuffled concepts that went through the same search.",
                found,
                [(title, _drawn(draw, tuned, title)) for title, draw in pictures],
            ),
            _Page(
                "experts",
                "The same model, carved into experts",
                f"Its layers were cut into {card['experts']} experts, of which a token takes "
                f"{card['top_k']}, without a look at any behaviour; then each was kept out alone, while the "
                "model chose between a number in digits and in words.",
                experts,
                header=("experts", "direction", "change of d", "random sets"),
                rows=[
                    (
                        str(row["experts"]),
                        row["direction"],
                        f"{signed(row['change'], 2)}",
                        f"{signed(row['random'], 2)} on average",
                    )
                    for row in (sweep.rows() if sweep is not None else ())
                ],
            ),
        ),
        commands=(
            (
                "Read a concept off pairs",
                "steersman refine MODEL pairs.jsonl -o concept --position target_mean",
            ),
            (
                "Find where and how hard to steer",
                f'steersman tune MODEL concept --task task.jsonl --keep kept.jsonl --cost "{COST}" -o plan',
            ),
            ("Talk to it", "steersman chat MODEL --steering plan"),
            ("Carve it into experts", "steersman lab carve MODEL --texts texts.jsonl -o moe"),
            ("Find those that cause a behaviour", "steersman screen moe items.jsonl -o causes"),
        ),
        limits=(
            "A small model, whose answers are often wrong, steered or not.",
            "Judged by a list of words. What else an answer says is only seen in the texts.",
            "A carved model is another than the one that it was carved from: its card says how far off.",
            "The cost was measured on capitals and opposites. What was not measured may have changed too.",
        ),
        facts=(
            (
                "made by",
                f"steersman {version('steersman')}, torch {version('torch')}, transformers "
                f"{version('transformers')}",
            ),
            ("on", f"Python {platform.python_version()}, {platform.machine()}, in {seconds:.0f} seconds"),
            ("model", model),
            (
                "carved, perplexity / dense",
                f"{card['ratio']:.2f}" if "ratio" in card else "see moe/carve.json",
            ),
        ),
    )


def _drawn(draw: Callable[..., bytes], tuned: Tuning, title: str) -> Markup:
    return both_themes(lambda theme: draw(tuned, theme=theme), title)
