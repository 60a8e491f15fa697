"""The emotions experiment of ConTrans (arXiv 2405.13578) on any checkpoint.

    python docs/emotions.py MODEL DATA [--source SMALL_MODEL --texts TEXTS] [--json FILE]

DATA is a folder with a JSON list of one-sentence scenarios for each emotion (anger.json, disgust.json …). For
each emotion a concept is refined from half of the scenarios (this emotion's against the others'), in MODEL or
in SOURCE, from where it is transplanted. It is added to MODEL while it names the emotion of scenarios of the
other half. Counted is whether the emotion's word is what MODEL says (token accuracy) and whether it is the
likeliest of the emotions' words (logit accuracy): on scenarios of the emotion, and on others, where the word
is wrong. Controls of the same norm: random directions drawn like the model's states, and concepts of shuffled
labels.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steersman
from steersman import ConceptVector, Steering
from steersman.concepts.controls import state_like_vectors

Plan = Steering | None


def prompt(scenario: str, answer: str = "") -> str:
    """What the model is asked; the answer is what it says next."""
    return f"Scenario: {scenario}\nWhat one feels in this scenario is{answer}"


@dataclass
class Count:
    """How often an arm said an emotion's word, of scenarios of that emotion (own) and of others."""

    emotion: str
    arm: str
    strength: str
    own: int = 0
    own_token: int = 0
    own_logit: int = 0
    other: int = 0
    other_token: int = 0
    other_logit: int = 0

    def add(self, kind: str, token: Tensor, logit: Tensor) -> None:
        """Count answers, one bool a scenario."""
        for name, more in (("", len(token)), ("_token", int(token.sum())), ("_logit", int(logit.sum()))):
            setattr(self, kind + name, getattr(self, kind + name) + more)

    def share(self, what: str) -> float:
        """Of `own_token` and the like."""
        return float(getattr(self, what)) / float(getattr(self, what.partition("_")[0]))


def table(counts: Sequence[Count]) -> str:
    """Mean shares by arm, with their range over emotions: scenarios share a vector, emotions do not."""
    lines = [f"{'':26} {'token':>20} {'logit':>20}   on others: {'token':>20} {'logit':>20}"]
    for arm, strength in dict.fromkeys((count.arm, count.strength) for count in counts):
        chosen = [count for count in counts if (count.arm, count.strength) == (arm, strength)]
        cells = []
        for what in ("own_token", "own_logit", "other_token", "other_logit"):
            shares = [count.share(what) for count in chosen]
            cells.append(f"{sum(shares) / len(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")
        own, others = (" ".join(f"{cell:>20}" for cell in pair) for pair in (cells[:2], cells[2:]))
        lines.append(f"{arm:16} {strength:>9} {own}   {'':10} {others}")
    return "\n".join(lines)


class Namer:
    """A model that names emotions: the log-probability of each word after a prompt, and whether it is what
    the model says by itself (each of the word's tokens the likeliest).
    """

    def __init__(self, model: Any, tokenizer: Any, words: Sequence[str], batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.words = [self._ids(prompt("x", f" {word}"))[len(self._ids(prompt("x"))) :] for word in words]
        if not all(self.words) or len(set(map(tuple, self.words))) < len(words):
            raise SystemExit(f"this tokenizer does not tell the words {', '.join(words)} apart")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def __call__(self, prompts: Sequence[str], arms: Sequence[Sequence[Plan]]) -> list[tuple[Tensor, Tensor]]:
        """Of each arm: of each prompt under its plan, log p of each word, and whether it is said: [prompts,
        words]. A prompt is read once, without its last token, for all words of all arms: plans of the scope
        `answer` begin at that token.
        """
        size = max(1, self.batch_size // len(self.words))
        read: list[list[tuple[Tensor, Tensor]]] = [[] for _ in arms]
        for start in range(0, len(prompts), size):
            ids = [self._ids(text) for text in prompts[start : start + size]]
            prefix = self._prefix(ids)
            for found, plans in zip(read, arms, strict=True):
                found.append(self._words(ids, plans[start : start + size], copy.deepcopy(prefix)))
        return [
            (torch.cat(chances), torch.cat(said)) for chances, said in (zip(*of, strict=True) for of in read)
        ]

    def _prefix(self, ids: Sequence[list[int]]) -> Any:
        """What the model has read of prompts but their last tokens, padded on the left."""
        mask = self._mask(ids, 0)[:, :-1]
        given = torch.zeros_like(mask)
        for row, start in enumerate(ids):
            given[row, mask.shape[1] - len(start) + 1 :] = torch.tensor(start[:-1])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return self._forward(given, mask, places, None).past_key_values

    def _words(self, ids: Sequence[list[int]], plans: Sequence[Plan], cache: Any) -> tuple[Tensor, Tensor]:
        count, most = len(self.words), max(map(len, self.words))
        cache.batch_repeat_interleave(count)
        given = torch.zeros(len(ids) * count, most, dtype=torch.int64)
        for row, (start, word) in enumerate((start, word) for start in ids for word in self.words):
            given[row, : len(word)] = torch.tensor([start[-1], *word[:-1]])  # padded on the right: not read
        mask = self._mask(ids, most - 1).repeat_interleave(count, 0)
        lengths = [len(start) for start in ids for _ in self.words]
        places = torch.tensor(lengths)[:, None] - 1 + torch.arange(most)
        rows = [plan for plan in plans for _ in self.words]
        with steersman.apply_rows(self.model, rows, prompt_lengths=lengths):
            logits = self._forward(given, mask, places, cache).logits.float().cpu()
        chances, said = [], []
        for of_row, word in zip(logits.log_softmax(-1), self.words * len(ids), strict=True):
            before, expected = of_row[: len(word)], torch.tensor(word)
            chances.append(before.gather(1, expected[:, None]).sum())
            said.append((before.argmax(-1) == expected).all())
        return torch.stack(chances).reshape(-1, count), torch.stack(said).reshape(-1, count)

    @staticmethod
    def _mask(ids: Sequence[list[int]], more: int) -> Tensor:
        """Where prompts, padded on the left, have tokens, and `more` after them."""
        longest = max(map(len, ids))
        return torch.tensor([[0] * (longest - len(start)) + [1] * (len(start) + more) for start in ids])

    def _forward(self, ids: Tensor, mask: Tensor, places: Tensor, cache: Any) -> Any:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        given = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        with torch.inference_mode():
            return self.model(**given, past_key_values=cache, use_cache=True)


def main() -> None:
    """Run the experiment; print a table, and write the counts with --json."""
    options = arguments()
    scenarios = {file.stem: json.loads(file.read_text()) for file in sorted(options.data.glob("*.json"))}
    for emotion, found in scenarios.items():
        random.Random(f"{options.seed} {emotion}").shuffle(found)
    emotions = list(scenarios)
    model, tokenizer = steersman.load_model(options.model, device=options.device, dtype=options.dtype)
    namer = Namer(model, tokenizer, emotions, options.batch_size)
    plans_of = planner(options, model, tokenizer)
    counts: list[Count] = []
    concepts: dict[str, Any] = {}
    for place, emotion in enumerate(emotions):
        plans, concepts[emotion] = plans_of(pairs_for(emotion, scenarios))
        questions = asked(emotion, scenarios, options)
        of_emotion = [Count(emotion, arm, strength) for arm, strength in plans]
        for kind, prompts in questions.items():
            arms = [[drawn[n % len(drawn)] for n in range(len(prompts))] for drawn in plans.values()]
            for count, (chances, said) in zip(of_emotion, namer(prompts, arms), strict=True):
                count.add(kind, said[:, place], chances.argmax(1) == place)
        counts += of_emotion
        print(f"{emotion}: {concepts[emotion]}", file=sys.stderr)
    print(table(counts))
    if options.json:
        report = {"model": options.model, "source": options.source, "concepts": concepts}
        arms = [asdict(count) for count in counts]
        options.json.write_text(json.dumps({**report, "arms": arms}, indent=2) + "\n")


def pairs_for(emotion: str, scenarios: dict[str, list[str]]) -> list[dict[str, str]]:
    """Contrast pairs of the first halves: this emotion's scenarios against others', an emotion in turn."""
    others = [name for name in scenarios if name != emotion]
    first = scenarios[emotion][: len(scenarios[emotion]) // 2]
    return [
        {
            "positive": prompt(scenario),
            "negative": prompt(scenarios[others[n % len(others)]][n // len(others)]),
        }
        for n, scenario in enumerate(first)
    ]


def asked(emotion: str, scenarios: dict[str, list[str]], options: Any) -> dict[str, list[str]]:
    """Prompts with scenarios of the second halves: of this emotion, and as many of the others."""
    second = {name: found[len(found) // 2 :] for name, found in scenarios.items()}
    others = [name for name in scenarios if name != emotion]
    own = second[emotion][: options.limit]
    other = [second[others[n % len(others)]][n // len(others)] for n in range(len(own))]
    lead = shots(scenarios) if options.shots else ""
    return {kind: [lead + prompt(s) for s in found] for kind, found in (("own", own), ("other", other))}


def shots(scenarios: dict[str, list[str]]) -> str:
    """An example of each emotion, which shows the form and no answer: each has the next emotion's word."""
    names = list(scenarios)
    words = [*names[1:], names[0]]
    return "".join(
        prompt(scenarios[name][len(scenarios[name]) // 2 - 1], f" {word}.\n")
        for name, word in zip(names, words, strict=True)
    )


Plans = dict[tuple[str, str], list[Plan]]


Made = Callable[[list[dict[str, str]]], tuple[Plans, dict[str, Any]]]


def planner(options: Any, model: Any, tokenizer: Any) -> Made:
    """What makes the plans of every arm of an emotion's pairs, {(arm, strength): plans, one a draw}, and says
    where the concept was found and how well it tells held-out pairs apart there.
    """
    source, bridge = (model, tokenizer), None
    if options.source:
        source = steersman.load_model(options.source, device=options.device, dtype=options.dtype)
        bridge = steersman.fit_affine_map(source, (model, tokenizer), options.texts, truncate=True)

    def plans_of(pairs: list[dict[str, str]]) -> tuple[Plans, dict[str, Any]]:
        concept = steersman.refine_concept(*source, pairs, batch_size=options.batch_size)
        plans: Plans = {("unsteered", ""): [None]}
        layer = options.layer
        texts = [text for pair in pairs for text in (pair["positive"], pair["negative"])]
        drawn: dict[int, Tensor] = {}
        for strength in options.strengths:
            if bridge is None:
                plan = concept.steering(strength, layer)
            else:  # without a layer: where the pairs are told apart best in MODEL, whatever the gate says
                known = {} if layer is not None else {"target": (model, tokenizer), "pairs": pairs}
                named = None if layer is None else [layer]
                plan = bridge.transplant(concept, strength, layers=named, force=True, **known)
            (edit,) = plan.edits
            (layer,) = edit.layers  # the same at each strength

            def scaled(direction: Tensor, edit: Any = edit, layer: int = layer) -> Steering:
                norm = edit.vectors[layer].norm() / direction.norm()
                return Steering.from_vectors(model, {layer: direction * norm}, strength=edit.strength)

            if layer not in drawn:
                drawn |= state_like_vectors(model, tokenizer, texts, [layer], options.draws, options.seed)
            plans["concept", strength] = [plan]
            plans["random", strength] = [scaled(direction) for direction in drawn[layer]]
            plans["labels shuffled", strength] = [
                scaled(direction) for direction in shuffled(concept, bridge, layer)[: options.draws]
            ]
        found = layer if bridge is None else bridge.layer_map(layer).source_layer
        separation = concept.separation[found]
        return plans, {"layer": layer, "refined_at": found, "auroc": separation and separation.auroc}

    return plans_of


def shuffled(concept: ConceptVector, bridge: Any, layer: int) -> list[Tensor]:
    """Concepts of shuffled labels at a layer of the model, through the same map."""
    if bridge is None:
        return list(concept.shuffled[:, concept.layers.index(layer)])
    source = concept.layers.index(bridge.layer_map(layer).source_layer)
    return [bridge.map_vector(layer, direction) for direction in concept.shuffled[:, source]]


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="the checkpoint that is steered: a folder, a Hub name or lab:NAME")
    parser.add_argument("data", type=Path, help="the folder of scenarios")
    parser.add_argument("--source", help="refine in this model, and transplant")
    parser.add_argument("--texts", help="the texts on which the map is fitted, one a line")
    parser.add_argument("--strengths", nargs="+", default=["dose:0.25", "dose:0.5", "dose:1"])
    parser.add_argument("--layer", type=int, help="of MODEL (default: by held-out separation)")
    parser.add_argument("--draws", type=int, default=20, help="of each control")
    parser.add_argument("--limit", type=int, help="scenarios of an emotion (default: half of them)")
    parser.add_argument("--shots", action="store_true", help="examples of the form before each scenario")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args()
    if options.source and not options.texts:
        parser.error("--source needs --texts, on which the map is fitted")
    return options


if __name__ == "__main__":
    main()
