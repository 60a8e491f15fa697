"""Pairs as token ids: which of them are no contrast, counted, named and left out wherever pairs are read."""

from __future__ import annotations

import functools
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import families as f
from steersman import PairsError, RoutingContrast, detect_experts, load_pairs, merge_contrasts, refine_concept

WORDS = ["café", "tea", "please", "one", "two", "three", "four", "sure", "no", "UPPER"]
NFD = "cafe\u0301"
TRIMS = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] | trim }} <|end|> {% endfor %}"
ROLELESS = "{% for m in messages %}{{ m['content'] }} <|end|> {% endfor %}"


@functools.cache
def model() -> nn.Module:
    return f.tiny("olmoe")


def tokenizer(*does: normalizers.Normalizer, template: str = TRIMS) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<pad>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = [*WORDS, *(word.lower() for word in WORDS if not word.islower())]
    backend = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate([*special, *words])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if does:
        backend.normalizer = normalizers.Sequence(list(does))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
        chat_template=template,
    )


def chat(question: str, answer: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": question}, {"role": "assistant", "content": answer}]


def pair(positive: Any, negative: Any, *targets: str) -> dict[str, Any]:
    keys = ("positive", "negative", "positive_target", "negative_target")
    return dict(zip(keys, (positive, negative, *targets), strict=False))


CONTRAST = pair("one two", "three two four")
ALIKE: dict[str, tuple[PreTrainedTokenizerFast, dict[str, Any], str]] = {
    "Unicode form": (
        tokenizer(normalizers.NFC()),
        pair("café please", f"{NFD} please"),
        'only in Unicode form: "é" (U+00E9) and "e\u0301" (U+0065 U+0301)',
    ),
    "lower-casing": (
        tokenizer(normalizers.Lowercase()),
        pair("upper tea", "UPPER tea"),
        'only in upper and lower case: "u" (U+0075) and "U" (U+0055)',
    ),
    "compatibility": (
        tokenizer(normalizers.NFKC()),
        pair("tea", "ｔea"),
        'only in compatibility characters: "t" (U+0074) and "ｔ" (U+FF54)',
    ),
    "a template that trims": (
        tokenizer(),
        pair(chat("one", "sure"), chat("one ", "sure")),
        'only in whitespace: "\\n" (U+000A) and " \\n" (U+0020 U+000A)',
    ),
    "a space twice": (
        tokenizer(),
        pair("one  two", "one two"),
        'only in whitespace: "  " (U+0020 U+0020) and " " (U+0020)',
    ),
    "a space at the end": (
        tokenizer(),
        pair("one two", "one two "),
        'only in whitespace: nothing and " " (U+0020)',
    ),
    "words that are not in the vocabulary": (
        tokenizer(),
        pair("tea oolong one", "tea puerh one"),
        'only in what is not kept: "o" (U+006F) and "p" (U+0070)',
    ),
    "roles that the template does not show": (
        tokenizer(template=ROLELESS),
        pair(chat("one", "sure"), chat("one", "sure", role="system")),
        "only in roles, which the template does not show",
    ),
    "after the target": (
        tokenizer(),
        pair("one two three", "one two four", "one two", "one two"),
        "only after the last token that is compared",
    ),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_sides_of_the_same_tokens_are_no_contrast(kind: str) -> None:
    reads, alike, how = ALIKE[kind]
    for use in (detect_experts, refine_concept):
        with pytest.raises(PairsError) as caught:
            use(model(), reads, [alike, alike])
        said = str(caught.value)
        assert said.startswith(
            "pairs: no pair is a contrast, as both sides are the same tokens: pair 1, pair 2 ("
        )
        assert how in said
        with pytest.warns(UserWarning, match=r"pairs: 1 pair left out, as both .*: pair 2 \("):
            found = use(model(), reads, [CONTRAST, alike])
        alone = use(model(), reads, [CONTRAST])
        assert (found.pairs, found.alike, alone.alike) == (1, 1, 0)
        if isinstance(found, type(alone)) and hasattr(found, "vectors"):
            assert all(torch.equal(found.vectors[layer], alone.vectors[layer]) for layer in alone.layers)


@pytest.mark.parametrize("use", [detect_experts, refine_concept])
def test_preferences_that_are_plain_texts_are_said_where_there_is_a_chat_template(use: Any) -> None:
    told = r"pairs: 2 preferences in plain text, .* without the chat template; .* \"prompt\": \[\{\"role\""
    texts: list[dict[str, Any]] = [
        {"prompt": "one ", "chosen": "sure", "rejected": "no"},
        {"chosen": "two sure", "rejected": "two no"},
    ]
    chats = [{**row, "prompt": [{"role": "user", "content": "one"}]} for row in texts[:1]]
    with pytest.warns(UserWarning, match=told) as said:
        use(model(), tokenizer(), [*texts, *chats])
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model(), tokenizer(), [*chats, {**chats[0], "chosen": "two"}])
        use(model(), tokenizer(), [("one two", "one three"), ("two one", "two three")])
        plain = tokenizer()
        plain.chat_template = None
        use(model(), plain, texts)


PROMPTS = [pair(chat("one", "sure"), chat("one", "no")), pair(chat("two", "sure"), chat("two", "no"))]
"""One prompt on both sides of each, and two answers."""


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"generate": 2}, "the prompts are the same, and answers and targets are not read"),
        ({"tokens": "prompt"}, "they differ only after the last token that is compared"),
    ],
)
def test_one_prompt_on_both_sides(options: dict[str, Any], how: str) -> None:
    with pytest.raises(
        PairsError, match=f"no pair is a contrast, as both sides are the same tokens: .*{how}"
    ):
        detect_experts(model(), tokenizer(), PROMPTS, **options)
    for rows, why in (
        ([pair("one two", "one two", "one", "two")], "the prompts are the same"),
        ([pair(chat("one", "sure"), chat("one ", "no"))], "they differ only in whitespace"),
    ):
        if "generate" in options:
            with pytest.raises(PairsError, match=why):
                detect_experts(model(), tokenizer(), rows, **options)
    assert detect_experts(model(), tokenizer(), PROMPTS, tokens="answer").alike == 0
    other = pair(chat("one", "sure"), chat("three", "sure"))
    with pytest.warns(UserWarning, match="2 pairs left out"):
        found = detect_experts(model(), tokenizer(), [*PROMPTS, other], **options)
    assert (found.pairs, found.alike, found.skipped) == (1, 2, 0)


def test_targets_that_end_at_one_place() -> None:
    """What `last` reads is one token; the mean over targets, and counts, know where they begin."""
    rows = [pair("one two three", "one two three", "two three", "three")]
    with pytest.raises(PairsError, match="the targets are the same tokens"):
        refine_concept(model(), tokenizer(), rows)
    assert refine_concept(model(), tokenizer(), rows, position="target_mean").alike == 0
    assert detect_experts(model(), tokenizer(), rows).alike == 0


def test_the_same_tokens_at_other_places_are_a_contrast() -> None:
    rows = [pair("one two one two", "one two one two", "one two", "one"), pair("one two", "three one two")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert detect_experts(model(), tokenizer(), rows).alike == 0


@pytest.mark.filterwarnings("ignore:.*pairs left out")
def test_shards_add_up_and_a_nuisance_counts_its_own(tmp_path: Path) -> None:
    rows = load_pairs(
        [pair(f"{word} one", f"{word} two") for word in WORDS[:6]]
        + [pair(f"{word} oolong", f"{word} puerh") for word in WORDS[:3]]
    )
    whole = detect_experts(model(), tokenizer(), rows, adjust=rows)
    parts = [detect_experts(model(), tokenizer(), rows, adjust=rows, shard=f"{n}/2") for n in (1, 2)]
    merged = merge_contrasts(parts)
    assert (whole.pairs, whole.alike, whole.nuisance.alike) == (6, 3, 3)
    assert (merged.pairs, merged.alike, merged.nuisance.alike) == (6, 3, 3)
    for found in (merged, refine_concept(model(), tokenizer(), rows)):
        found.save_pretrained(tmp_path / "saved", force=True)
        assert type(found).from_pretrained(tmp_path / "saved").alike == 3
    merged.save_pretrained(tmp_path / "contrast")
    assert RoutingContrast.from_pretrained(tmp_path / "contrast").nuisance.alike == 3
    few = [pair(rows[n].positive, rows[n].negative) for n in (0, 6, 1)]
    with pytest.raises(PairsError, match=r"in shard 2/2 \(3 clusters\), as both .*: pair 2 \("):
        detect_experts(model(), tokenizer(), few, shard="2/2")


def test_many_are_named_by_the_first_few() -> None:
    rows = [pair(f"{word} oolong", f"{word} puerh") for word in WORDS]
    with pytest.raises(PairsError) as caught:
        detect_experts(model(), tokenizer(), rows)
    assert "pair 1, pair 2, pair 3, pair 4, pair 5 (they differ" in str(caught.value)
    assert "; and 5 more" in str(caught.value)


def test_nothing_stays_open_where_encoding_ends_in_an_error() -> None:
    def ends() -> None:
        with pytest.raises(PairsError):
            detect_experts(model(), tokenizer(), [{"positive": "unheard", "negative": "unseen"}])

    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # an unclosed file warns when it is collected, in whatever test that is
        ends()
        gc.collect()
