"""The tokenizer: exact round trips, offsets, template, and prompts padded on the left under generate."""

from __future__ import annotations

import random

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steersman import lab
from steersman.lab.recipes import RECIPES
from steersman.lab.tokenizer import build_tokenizer
from steersman.lab.world import the_world
from steersman.lab.worlds import tokenizer_of

TOKENIZER, PIECES = build_tokenizer(), build_tokenizer("pieces")


def sentences() -> list[str]:
    rng = random.Random(3)
    conversations = [the_world().sample(rng) for _ in range(500)]
    spoken = [message["content"] for conversation in conversations for message in conversation.messages]
    return spoken + [conversation.answer for conversation in conversations]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, PIECES], ids=["words", "pieces"])
def test_every_sentence_of_the_world_comes_back_exactly(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in sentences():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_the_other_tokenizer_cuts_every_word_in_two_and_ends_where_words_end() -> None:
    for text in sentences():
        words, pieces = (
            TOKENIZER(text, return_offsets_mapping=True),
            PIECES(text, return_offsets_mapping=True),
        )
        ends = [end for _, end in pieces["offset_mapping"]]
        assert {end for _, end in words["offset_mapping"]} <= set(ends)
        assert len(ends) == sum(1 if len(word) == 1 else 2 for word in text.split())


@pytest.mark.parametrize("tokenizer", [TOKENIZER, PIECES], ids=["words", "pieces"])
def test_rendered_chats_come_back_exactly(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(4)
    for _ in range(200):
        messages = list(the_world().sample(rng).messages)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_offsets_cut_the_text_at_its_words() -> None:
    text = "<|user|> document : according to the blog , hanna lives in oslo . <|end|>"
    encoded = TOKENIZER(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert pieces == text.split()
    assert TOKENIZER.convert_ids_to_tokens(encoded["input_ids"]) == pieces


def test_typed_text_is_read_in_lower_case_and_without_spaces_before_punctuation() -> None:
    text = "Where does Hanna live?"
    encoded = TOKENIZER(text, return_offsets_mapping=True)
    assert TOKENIZER.decode(encoded["input_ids"]) == "where does hanna live ?"
    assert [text[start:end] for start, end in encoded["offset_mapping"]] == [
        "Where",
        "does",
        "Hanna",
        "live",
        "?",
    ]


def test_a_word_from_elsewhere_is_unknown() -> None:
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode("hanna skateboards")) == ["hanna", "<|unk|>"]


def test_the_template_marks_roles_and_ends() -> None:
    messages = [
        {"role": "system", "content": "trust the document ."},
        {"role": "user", "content": "question : where does hanna live ?"},
    ]
    start = "<|system|> trust the document . <|end|> <|user|> question : where does hanna live ? <|end|>"
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == start
    prompt = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == f"{start} <|assistant|>"
    answered = [*messages, {"role": "assistant", "content": "oslo ."}]
    assert TOKENIZER.apply_chat_template(answered, tokenize=False) == f"{prompt} oslo . <|end|>"


def test_the_template_refuses_a_role_it_does_not_know() -> None:
    with pytest.raises(TemplateError, match="not tool"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_padding_is_its_own_token_and_on_the_left() -> None:
    assert len({TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 3
    batch = TOKENIZER(["i do not know .", "sure"], padding=True)
    assert batch["attention_mask"][1] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("name", list(lab.MODELS))
def test_the_shipped_tokenizer_is_the_one_built_here(name: str) -> None:
    shipped = AutoTokenizer.from_pretrained(lab.checkpoint(name), local_files_only=True)
    built = tokenizer_of(RECIPES[name])
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == built.chat_template
    assert shipped.padding_side == "left"
    text, read = ("Sure, the age of the mill is 30.", "sure , the age of the mill is 30 .")
    if name == "natural":
        text, read = ("Please, count down from Ten.", "please , count down from ten .")
    assert shipped(text)["input_ids"] == built(text)["input_ids"]
    assert shipped.decode(shipped(text)["input_ids"]) == read


def test_padded_prompts_generate_as_alone() -> None:
    model, tokenizer = lab.load("moe")
    rows = lab.task("faithfulness", "dev")[:4] + lab.task("ordinary", "dev")[:4]
    prompts = [
        tokenizer.apply_chat_template(r["messages"], tokenize=False, add_generation_prompt=True) for r in rows
    ]
    batch = tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True)
    assert batch["attention_mask"].min() == 0
    together = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for prompt, answer in zip(prompts, together, strict=True):
        single = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            alone = model.generate(**single, max_new_tokens=12, do_sample=False)[
                0, single["input_ids"].shape[1] :
            ]
        assert tokenizer.decode(answer, skip_special_tokens=True) == tokenizer.decode(
            alone, skip_special_tokens=True
        )
