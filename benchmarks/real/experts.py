"""Expert steering on Mixture-of-Experts carved out of a dense model, and its controls (docs/real_models.md).

    python benchmarks/real/experts.py DENSE TEXTS TASKS OUT [--carves 0,random,1,2] [--behaviours digits]

TEXTS is the folder that carving_texts.py wrote, TASKS that of tasks.py. A carve is a seed, or `random`:
seed 0 with its neurons shuffled between the experts. On development items experts are screened and the risk
difference gets its number of experts; all else is measured on test items of other groups. OUT keeps the
carves, the screens, and a line of pieces.jsonl for each piece of work: run again, it goes on with what is
missing. --save writes benchmarks/results/real_experts.json from the pieces that are there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

sys.path.insert(0, str(Path(__file__).parents[1]))
from measuring import RESULTS, hardware

import steersman
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.controls import random_plans
from steersman.evaluation.instructing import instructed
from steersman.evaluation.screening.sizes import SizeSweep
from steersman.evaluation.statistics import clustered_mean, random_control
from steersman.lab.carving import carve

Piece = dict[str, Any]
Line = dict[str, Any]
INSTRUCTIONS = {
    "french": ("Answer in French.", "Answer in English."),
    "digits": ("Write numbers in digits.", "Write numbers in words."),
    "refusal": ("Refuse to answer.", "Answer every question."),
}
"""Toward the positive side of a behaviour, and reversed."""
DIRECTIONS = ("toward", "reversed")
TEXTS = ("wiki", "stories", "qa", "emotions", "chats")
SIZES = (4, 16, 64)
"""Numbers of experts that the risk difference is tried with; 96 of 960 are a tenth."""
AT_MOST = 8
"""Experts of a screened set."""
ORDINARY = 24
LAST_LAYERS = 2


SYSTEM = "Answer briefly."
"""A short system message instead of the template's own: half of a short prompt's tokens."""


def asking(prompt: str, system: str = SYSTEM) -> list[Line]:
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def spread(rows: Sequence[Line]) -> list[Line]:
    """One of each group before a second of any, in an order that no result can depend on."""
    seen: Counter[str] = Counter()
    turns = []
    for row in sorted(rows, key=lambda row: digest(row["id"])):
        turns.append((seen[row["group"]], digest(row["group"]), row))
        seen[row["group"]] += 1
    return [row for *_, row in sorted(turns, key=lambda turn: turn[:2])]


class Items:
    """Development and test items of a behaviour, of different groups, as files and as tasks."""

    def __init__(self, tasks: Path, out: Path, behaviour: str, development: int, test: int) -> None:
        header, *rows = map(json.loads, (tasks / f"{behaviour}-task.jsonl").read_text("utf-8").splitlines())
        groups = sorted({row["group"] for row in rows}, key=digest)[:development]
        self.development = spread([row for row in rows if row["group"] in groups])[:development]
        parts = {
            "dev": self.development,
            "test": spread([row for row in rows if row["group"] not in groups])[:test],
        }
        out.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            asked = [
                {**{key: row[key] for key in row if key != "prompt"}, "messages": asking(row["prompt"])}
                for row in part
            ]
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *asked)]
            (out / f"{behaviour}-{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        self.dev = steersman.load_task(str(out / f"{behaviour}-dev.jsonl"))
        self.test = steersman.load_task(str(out / f"{behaviour}-test.jsonl"))
        self.instructions = INSTRUCTIONS[behaviour]

    def pairs(self, tokens: str) -> list[Line]:
        """Contrast pairs of the development items: both answers; or the prompt after either instruction."""
        found = []
        for row in self.development:
            prompt, sides = row["prompt"], {}
            for side, instruction in zip(("positive", "negative"), self.instructions, strict=True):
                answer = row[side] if isinstance(row[side], str) else row[side][0]
                if tokens == "prompt":
                    sides |= {side: asking(prompt, f"{SYSTEM} {instruction}"), f"{side}_target": prompt}
                else:
                    sides[side] = [*asking(prompt), {"role": "assistant", "content": answer}]
            found.append({**sides, "group": row["group"]})
        return found


class Study:
    """One behaviour of one carve: its pieces of work."""

    def __init__(self, model: Any, tokenizer: Any, items: Items, place: Path, options: Any) -> None:
        self.model, self.tokenizer, self.items, self.place = model, tokenizer, items, place
        self.draws, self.control_items = options.draws, options.control_items
        self.contrasts: dict[str, Any] = {}

    @property
    def screen(self) -> steersman.CausalScreen:
        if not self.place.exists():
            found = steersman.screen_experts(
                self.model,
                self.tokenizer,
                self.items.dev,
                choose="rounds",
                exact_runs=24,
                at_most=AT_MOST,
                limit=len(self.items.dev),
            )
            found.save_pretrained(self.place)
        return steersman.CausalScreen.from_pretrained(self.place)

    def screening(self) -> Piece:
        screen = self.screen
        sets = {direction: chosen.to_json() for direction, chosen in screen.sets.items()}
        return {"reason": screen.reason, "sets": sets}

    def contrast(self, tokens: str) -> steersman.RoutingContrast:
        if tokens not in self.contrasts:
            pairs = steersman.load_pairs(self.items.pairs(tokens))
            self.contrasts[tokens] = steersman.detect_experts(self.model, self.tokenizer, pairs)
        return self.contrasts[tokens]

    def sweep(
        self, items: Any, direction: str, ranking: Sequence[Any], size: int, draws: int = 0
    ) -> SizeSweep:
        return steersman.sweep_sizes(
            self.model, self.tokenizer, items, {direction: ranking[:size]}, sizes=[size], draws=draws
        )

    def chosen(self, direction: str, last_layers: bool = True) -> list[tuple[int, int, float]]:
        """The screened set; without the last layers, as many of the best experts of the others."""
        screen = self.screen
        number = min(len(screen.sets[direction].picks), AT_MOST)
        order = screen.order(reverse=direction == "reversed")
        end = len(screen.layers) - (0 if last_layers else LAST_LAYERS)
        return [entry for entry in order if entry[0] < end][:number]

    def moved(self, direction: str, last_layers: bool = True) -> Piece:
        """The paired change of d on all test items, and beside matched random sets on the first of them."""
        ranking = self.chosen(direction, last_layers)
        if not ranking:
            return {"experts": 0}
        found = told(self.sweep(self.items.test, direction, ranking, len(ranking)))
        if last_layers and self.draws:
            some = self.items.test[: self.control_items]
            task = type(self.items.test)(self.items.test.name, some, self.items.test.behaviour)
            beside = self.sweep(task, direction, ranking, len(ranking), self.draws)
            found["control"] = told(beside) | {"random_means": beside.random[:, 0].mean(axis=1).tolist()}
        return found

    def risk_difference(self, tokens: str) -> Piece:
        """Its best number of experts on development items, measured on test items."""
        contrast, screen = self.contrast(tokens), self.screen
        of_effects = stats.spearmanr(contrast.risk_difference.ravel(), -screen.deactivate.mean.ravel())
        found: Piece = {"rank_correlation": float(of_effects.statistic)}
        for direction in DIRECTIONS:
            sign = 1 if direction == "toward" else -1
            ranking = contrast.ranking(reverse=sign < 0)
            tried = [told(self.sweep(self.items.dev, direction, ranking, size)) for size in SIZES]
            best = max(tried, key=lambda one: sign * one["change"])["experts"]
            found[direction] = told(self.sweep(self.items.test, direction, ranking, best))
            found[direction]["development"] = {one["experts"]: one["change"] for one in tried}
        return found

    def prompt(self) -> Piece:
        """What an instruction does to d."""
        subject, task = Subject(self.model, self.tokenizer), self.items.test
        before = subject.preference(subject.forks(task))
        found: Piece = {}
        for direction, instruction in zip(DIRECTIONS, self.items.instructions, strict=True):
            asked = (
                replace(item, content=instructed(item.content, instruction, None, self.tokenizer))
                for item in task
            )
            forks = subject.forks(type(task)(task.name, asked, task.behaviour))
            found[direction] = interval(subject.preference(forks) - before, task.groups)
        return found

    def plan(self, direction: str) -> steersman.Steering:
        """The screened set as a plan."""
        sides: dict[bool, dict[int, list[int]]] = {True: {}, False: {}}
        for layer, expert, score in self.chosen(direction):
            sides[score > 0].setdefault(layer, []).append(expert)
        return steersman.Steering.from_experts(self.model, activate=sides[True], deactivate=sides[False])

    def side_effect(self, texts: Sequence[str]) -> Piece:
        """KL to the unsteered model per token of ordinary texts, in nats."""
        subject = Subject(self.model, self.tokenizer)
        return {
            direction: interval(
                [read.divergence for read in subject.condition(Arm("", plan)).readings(texts)]
            )
            for direction in DIRECTIONS
            if self.chosen(direction) and (plan := self.plan(direction))
        }

    def written(self, number: int, draws: int = 0, control: Sequence[str] = ()) -> Piece:
        """Judged answers: unsteered, toward and reversed; or under matched random plans."""
        toward, back = map(self.plan, DIRECTIONS)
        plans = {} if draws else {"toward": toward, "reversed": back}
        drawn = random_plans(self.contrast("answer"), toward, back, draws=draws) if draws else []
        for place, plan in enumerate(drawn):
            both = {"toward": plan.toward, "reversed": plan.reverse}
            plans |= {f"random {direction} {place}": both[direction] for direction in control}
        whole = self.items.test
        judged = replace(whole.behaviour, answers=False)  # written answers alone: d is measured elsewhere
        task = type(whole)(whole.name, whole[:number], judged)
        checkpoint = self.place.parent / f"{self.place.name}-written{draws}"
        found = steersman.evaluate(
            self.model, self.tokenizer, plans, task=task, random=0, batch_size=50, shown=0,
            checkpoint=checkpoint, resume=checkpoint.exists(),
        )  # fmt: skip
        record = found.to_json()["tasks"][0]
        return {
            "rates": {arm: figures["positive"] for arm, figures in record["results"].items()},
            "differences": {arm: figures["positive"] for arm, figures in record["differences"].items()},
            "outcomes": {
                arm: [one.outcome for one in noted] for arm, noted in found.noted[task.name].items()
            },
        }


def all_at_once(experts: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """All experts of a layer in one product, those that were not chosen with weight 0: what the model's own
    code computes up to rounding, and quicker on a CPU where three of four are chosen. Of one expert a token,
    as estimates want them, each by itself.
    """
    if chosen.shape[1] == 1:
        found = torch.zeros_like(states)
        for expert in chosen.unique().tolist():
            rows = (chosen[:, 0] == expert).nonzero()[:, 0]
            gate, up = F.linear(states[rows], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up * weights[rows]
            found[rows] = F.linear(inner, experts.down_proj[expert])
        return found
    of_all = torch.zeros(len(states), experts.num_experts, dtype=weights.dtype).scatter_(1, chosen, weights)
    parts = F.linear(states, experts.gate_up_proj.flatten(0, 1)).unflatten(1, (experts.num_experts, -1))
    gate, up = parts.chunk(2, dim=-1)
    inner = experts.act_fn(gate) * up * of_all[..., None].to(states.dtype)
    return inner.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)


def interval(values: Any, groups: Sequence[str] | None = None) -> Piece:
    found = clustered_mean(values, groups)
    return {"change": found.mean, "low": found.low, "high": found.high, "items": found.count}


def told(sweep: SizeSweep) -> Piece:
    """The one set of a sweep: its change, and that of each item."""
    one = sweep.to_json()
    (row,) = one.pop("sets")
    changes = [round(value, 4) for value in sweep.changes[0].tolist()]
    return one | row | {"changes": changes, "item_groups": sweep.groups}


def opened(out: Path, options: Any, name: str) -> tuple[Any, Any]:
    """A carve, made where it is not there."""
    place = out / f"carve-{name}"
    if not place.exists():
        sources = [options.texts / f"{text}.jsonl" for text in TEXTS]
        shuffled = name == "random"
        seed = 0 if shuffled else int(name)
        carve(options.dense, None, sources, place, tokens=options.tokens, random=shuffled, seed=seed)
    model, tokenizer = steersman.load_model(str(place))
    ALL_EXPERTS_FUNCTIONS.register(all_at_once.__name__, all_at_once)
    model.set_experts_implementation(all_at_once.__name__)
    return model, tokenizer


def pieces_of(
    study: Study, behaviour: str, ordinary: Sequence[str], options: Any
) -> Mapping[str, Callable[[], Piece]]:
    pieces: dict[str, Callable[[], Piece]] = {
        "screen": study.screening,
        **{direction: lambda direction=direction: study.moved(direction) for direction in DIRECTIONS},
        "kl": lambda: study.side_effect(ordinary),
        "risk difference answer": lambda: study.risk_difference("answer"),
        "risk difference prompt": lambda: study.risk_difference("prompt"),
        "prompt": study.prompt,
    }
    if behaviour == "refusal":
        for direction in DIRECTIONS:
            pieces[f"{direction} without the last layers"] = lambda direction=direction: study.moved(
                direction, False
            )
    pieces["written"] = lambda: study.written(options.written_items)
    pieces["written random"] = lambda: study.written(
        options.control_items, options.written_draws, options.written_control
    )
    return {name: work for name, work in pieces.items() if not options.pieces or name in options.pieces}


def main() -> int:
    options = arguments()
    file = options.out / "pieces.jsonl"
    done = (
        {line["key"]: line for line in map(json.loads, file.read_text().splitlines())}
        if file.exists()
        else {}
    )
    lines = (options.tasks / "ordinary.jsonl").read_text("utf-8").splitlines()
    rows = {row["group"]: row["prompt"] for row in map(json.loads, lines)}
    ordinary = list(rows.values())[:: len(rows) // ORDINARY][:ORDINARY]
    for name in options.carves:
        model = tokenizer = None
        for behaviour in options.behaviours:
            items = Items(options.tasks, options.out / "items", behaviour, options.development, options.test)
            study = Study(model, tokenizer, items, options.out / f"screen-{name}-{behaviour}", options)
            for piece, work in pieces_of(study, behaviour, ordinary, options).items():
                key = f"{name}/{behaviour}/{piece}"
                if key in done:
                    continue
                if model is None:
                    model, tokenizer = opened(options.out, options, name)
                study.model, study.tokenizer = model, tokenizer
                start = time.process_time()
                done[key] = {"key": key, **work(), "cpu_seconds": round(time.process_time() - start, 1)}
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(done[key]) + "\n")
                print(f"{key}: {done[key]['cpu_seconds']} s", flush=True)
    if options.save:
        save(done, options)
    return 0


def save(done: Mapping[str, Piece], options: Any) -> None:
    """The figures without the single items' and draws' own."""
    kept = {}
    for key, piece in done.items():
        kept[key] = json.loads(json.dumps(piece), object_hook=without_items)
        del kept[key]["key"]
    names = options.carves
    cards = {
        name: json.loads((options.out / f"carve-{name}" / "carve.json").read_text())["judged"]
        for name in names
        if (options.out / f"carve-{name}").exists()
    }
    content = {
        "what": "expert steering on Mixture-of-Experts carved by benchmarks/real/experts.py",
        **hardware(),
        "dense": options.dense.name,
        "carves": cards,
        "pieces": kept,
        "carve_minus_random": against_random(done),
        "toward_minus_reversed": beside_random(done),
    }
    place = RESULTS / "real_experts.json"
    place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"kept in {place}")


def without_items(found: Piece) -> Piece:
    return {
        name: value
        for name, value in found.items()
        if name not in ("changes", "item_groups", "random_means", "outcomes", "task")
    }


def against_random(done: Mapping[str, Piece]) -> dict[str, Piece]:
    """What a carve's screened set moves d more, on the same items, than the shuffled carve's does."""
    found = {}
    for key, piece in done.items():
        name, _, of = key.partition("/")
        other = done.get(f"random/{of}")
        if name != "random" and other and "changes" in piece:
            theirs = np.array(other.get("changes", np.zeros(len(piece["changes"]))))  # no set: no change
            found[key] = interval(np.array(piece["changes"]) - theirs, piece["item_groups"])
    return found


def beside_random(done: Mapping[str, Piece]) -> dict[str, Piece]:
    """Toward minus reversed of a screened set, and the random sets that go as far."""
    found = {}
    for key in sorted(done):
        pair = [
            done.get(f"{key.rpartition('/')[0]}/{direction}", {}).get("control") for direction in DIRECTIONS
        ]
        if key.endswith("/toward") and all(pair):
            toward, back = pair
            observed = toward["change"] - back["change"]
            drawn = np.array(toward["random_means"]) - np.array(back["random_means"])
            figures = vars(random_control(observed, drawn)) | {"draws": len(drawn), "largest": drawn.max()}
            found[key.rpartition("/")[0]] = figures
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("dense", "texts", "tasks", "out"):
        parser.add_argument(name, type=Path)
    several: dict[str, Any] = {"type": lambda text: text.split(",")}
    parser.add_argument("--carves", default=["0", "random", "1", "2"], **several)
    parser.add_argument("--behaviours", default=list(INSTRUCTIONS), **several)
    parser.add_argument("--pieces", default=[], help="only these", **several)
    parser.add_argument("--written-control", default=list(DIRECTIONS), help="of the random plans", **several)
    for name, number in (
        ("tokens", 16384),
        ("development", 48),
        ("test", 150),
        ("draws", 199),
        ("control-items", 50),
        ("written-items", 100),
        ("written-draws", 19),
    ):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/real_experts.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
