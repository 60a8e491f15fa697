"""Measures: choice and diversity against slow, obvious versions, and every measure on a lab model."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steersman import Steering
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.condition import Condition
from steersman.evaluation.measures import Choice, Naming, ReadTexts, Samples
from steersman.evaluation.measures.choice import chooses, probability_of
from steersman.evaluation.measures.diversity import distinct, vendi
from steersman.evaluation.prompts import encode_answer
from steersman.evaluation.tasks import Item, load_task

TOTALS = st.lists(st.floats(-50, 0), min_size=2, max_size=6)
WORDS = st.lists(st.lists(st.sampled_from("abcd"), max_size=6), min_size=1, max_size=6)


@given(TOTALS, st.data())
def test_choice_is_that_of_its_definition(totals: list[float], data: st.DataObject) -> None:
    places = st.lists(st.integers(0, len(totals) - 1), min_size=1, max_size=len(totals) - 1, unique=True)
    correct = data.draw(places)
    others = [total for place, total in enumerate(totals) if place not in correct]
    assert chooses(totals, correct) == all(any(totals[c] > other for c in correct) for other in others)
    wanted = sum(math.exp(totals[c]) for c in correct) / sum(map(math.exp, totals))
    assert probability_of(totals, correct) == pytest.approx(wanted)


def test_a_tie_up_to_rounding_is_wrong() -> None:
    for noise in (-1e-6, 0.0, 1e-6):
        assert not chooses([-2.5 + noise, -2.5, -7.0], [0])
        assert chooses([-2.5 + noise, -2.5, -7.0], [0, 1])


def test_probabilities_that_are_tiny_or_nothing() -> None:
    assert probability_of([-5000.0, -5000.0 + math.log(3)], [1]) == pytest.approx(0.75)
    assert probability_of([-math.inf, -3.0], [0]) == 0
    assert math.isnan(probability_of([-math.inf, -math.inf], [0]))


def slow_vendi(texts: list[list[str]]) -> float:
    def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
        return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]

    def cosine(a: list[tuple[str, ...]], b: list[tuple[str, ...]]) -> float:
        if not a or not b:
            return float(a == b)
        dot = sum(a.count(gram) * b.count(gram) for gram in set(a))
        norms = [sum(one.count(gram) ** 2 for gram in set(one)) for one in (a, b)]
        return dot / math.sqrt(norms[0] * norms[1])

    size = len(texts)
    kernel = np.zeros((size, size))
    for (i, a), (j, b), n in itertools.product(enumerate(texts), enumerate(texts), (1, 2)):
        kernel[i, j] += cosine(grams(a, n), grams(b, n)) / 2
    values = np.linalg.eigvals(kernel / size).real
    return math.exp(-sum(value * math.log(value) for value in values if value > 1e-12))


@given(WORDS)
def test_the_vendi_score_counts_different_texts(texts: list[list[str]]) -> None:
    assert vendi(texts) == pytest.approx(slow_vendi(texts), rel=1e-6)
    assert 1 - 1e-9 <= vendi(texts) <= len(texts) + 1e-9
    assert vendi([texts[0]] * 4) == pytest.approx(1)


def test_texts_that_share_nothing_are_worth_their_number() -> None:
    assert vendi([["a", "b"], ["c", "d"], ["e", "f"]]) == pytest.approx(3)


@given(WORDS, st.integers(1, 2))
def test_distinct_counts_pooled_n_grams(texts: list[list[str]], n: int) -> None:
    pooled = [tuple(words[at : at + n]) for words in texts for at in range(len(words) - n + 1)]
    found = distinct(texts, n)
    assert math.isnan(found) if not pooled else found == len(set(pooled)) / len(pooled)


def options_item(subject: Subject, id_: str) -> Item:
    item = load_task("lab:ordinary/dev", limit=1)[0]
    options = (item.positive, "i cannot help with that .", "the the the")
    return replace(item, id=id_, options=options, correct=(0,), facts={"best": 0})


@torch.inference_mode()
def log_p(subject: Subject, item: Item, option: str) -> float:
    """log p of an option, token by token."""
    ids, start = encode_answer(subject.tokenizer, item.content, option)
    total = 0.0
    for place in range(start, len(ids)):
        logits = subject.model(torch.tensor([ids[:place]])).logits[0, -1]
        total += logits.log_softmax(-1)[ids[place]].item()
    return total


def test_choice_and_naming_on_a_model(subject: Subject) -> None:
    condition = Condition(subject, Arm("base", None))
    item = options_item(subject, "1")
    totals = [log_p(subject, item, option) for option in item.options]
    (chosen,), (truthful,), (named,) = (
        measure.run(condition, [item]) for measure in (Choice(), Choice(truthful=True), Naming())
    )
    assert chosen.text == item.options[int(np.argmax(totals))] == item.positive
    assert chosen.scores["probability"] == pytest.approx(math.exp(totals[0]) / sum(map(math.exp, totals)))
    assert chosen.scores["accuracy"] == truthful.scores["mc1"] == named.scores["logit_accuracy"] == 1
    assert truthful.scores["mc2"] == chosen.scores["probability"]
    assert named.scores["token_accuracy"] == float(condition.answers([item.content])[0] == item.positive)


def test_a_likelihood_that_is_no_number_is_no_score(subject: Subject) -> None:
    broken = Steering.from_experts(subject.model, deactivate={0: [0]})
    item = options_item(subject, "1")

    class Broken(Condition):
        def log_likelihoods(self, contents, continuations):  # type: ignore[no-untyped-def]
            found = super().log_likelihoods(contents, continuations)
            return [[replace(one, total=math.nan) for one in row] for row in found]

    for measure in (Choice(), Naming()):
        (measured,) = measure.run(Broken(subject, Arm("steered", broken)), [item])
        assert (measured.outcome, dict(measured.scores), measured.text) == (None, {}, "")
        assert "not a number" in measured.why


def test_reading_and_samples_on_a_model(subject: Subject) -> None:
    base = Condition(subject, Arm("base", None))
    plan = Steering.from_experts(subject.model, deactivate={2: [0, 1, 2]}, scope="answer")
    steered = Condition(subject, Arm("steered", plan))
    item = Item("1", "1", "the nightcode of the mill is 23 .", "", None, "")
    plain, changed = (ReadTexts().run(condition, [item])[0].scores for condition in (base, steered))
    assert set(plain) == {"nll"}
    assert set(changed) == {"nll", "kl"}
    assert changed["kl"] > 0
    prompts = list(load_task("lab:ordinary/dev", limit=2))
    first, again = (Samples(count=3, max_new_tokens=6).run(base, prompts) for _ in range(2))
    assert first == again
    assert all(len((one.text, *one.more)) == 3 and 1 <= one.scores["vendi"] <= 3 for one in first)
