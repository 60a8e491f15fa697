"""Templates, their arguments and the date: what is given reaches the model, and what cannot is refused."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from chats import templates
from chats.templates import chat
from steersman import ModelError, load_model
from steersman.chat_record import ChatRecord, common, rendered_otherwise
from steersman.chats.format import NotedChats, chat_format
from steersman.chats.setting import set_chat_format
from steersman.models.loading import load_tokenizer
from steersman.progress import differences
from steersman.rendering import render

fresh = templates.tokenizer_of.__wrapped__
DAY = "2026-11-29"


DATED = {
    "Llama 3": (templates.LLAMA_3, "Today Date: 29 Nov 2026"),
    "GPT-OSS": (templates.GPT_OSS, "Current date: 2026-11-29"),
    "in a macro": (
        "{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{{ day() }}" + templates.CHATML,
        "Sunday",
    ),
}


@pytest.mark.parametrize("name", DATED)
def test_the_date_is_what_was_asked_for(name: str) -> None:
    template, words = DATED[name]
    tokenizer = fresh(template)
    today = tokenizer.apply_chat_template(chat("user"), tokenize=False)
    set_chat_format(tokenizer, date=DAY)
    noted = NotedChats(tokenizer)
    assert words in render(tokenizer, chat("user"))[0]
    record = noted.record
    assert record is not None
    assert record.date == DAY
    # Whoever renders with transformers alone has the machine's clock, before and after.
    assert tokenizer.apply_chat_template(chat("user"), tokenize=False) == today
    for given in (datetime.date(2026, 11, 29), datetime.datetime(2026, 11, 29, 23, 59)):
        set_chat_format(tokenizer, date=given)
        assert words in render(tokenizer, chat("user"))[0]


def test_a_date_is_fixed_for_a_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = fresh(templates.GPT_OSS)
    first = render(tokenizer, chat("user"))[0]

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return datetime.date(2100, 1, 1)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert render(tokenizer, chat("user"))[0] == first


def test_a_template_that_asks_for_no_date_has_none() -> None:
    tokenizer = fresh(templates.CHATML)
    noted = NotedChats(tokenizer)
    render(tokenizer, chat("user"))
    record = noted.record
    assert record is not None
    assert record.date is None
    # One that was told the date as text does not ask.
    told = fresh(templates.LLAMA_3)
    set_chat_format(told, arguments={"date_string": "1 Jan 2000"})
    noted = NotedChats(told)
    assert "Today Date: 1 Jan 2000" in render(told, chat("user"))[0]
    record = noted.record
    assert record is not None
    assert (record.arguments, record.date) == ({"date_string": "1 Jan 2000"}, None)


def test_arguments_reach_the_template() -> None:
    tokenizer = fresh(templates.QWEN_3)
    assert "<think>" not in render(tokenizer, chat("user"))[0]
    set_chat_format(tokenizer, arguments={"enable_thinking": False})
    assert render(tokenizer, chat("user"))[0].endswith("<think>\n\n</think>\n\n")


def test_of_several_templates_the_one_for_tools_is_recorded_and_dated() -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }} "
    tokenizer = fresh({"default": templates.CHATML, "tool_use": dated + templates.CHATML})
    assert "2026" not in render(tokenizer, chat("user"))[0]
    tool = {"type": "function", "function": {"name": "f"}}
    with_tools = dated + "{% if tools %}tools{% endif %}" + templates.CHATML
    tokenizer.chat_template["tool_use"] = with_tools
    set_chat_format(tokenizer, arguments={"tools": [tool]}, date=DAY)
    noted = NotedChats(tokenizer)
    assert render(tokenizer, chat("user"))[0].startswith(f"{DAY} tools")
    record = noted.record
    assert record is not None
    assert record.template_sha256 == hashlib.sha256(with_tools.encode()).hexdigest()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such argument": (
        templates.QWEN_3,
        {"arguments": {"thinking": 1}},
        'never uses the argument "thinking"; those it uses: enable_thinking',
    ),
    "no argument at all": (
        templates.CHATML,
        {"arguments": {"enable_thinking": False}},
        "those it uses: none",
    ),
    "ours": (templates.CHATML, {"arguments": {"messages": []}}, 'never uses the argument "messages"'),
    "a set": (templates.QWEN_3, {"arguments": {"enable_thinking": {1, 2}}}, "not JSON"),
    "bytes": (templates.QWEN_3, {"arguments": {"enable_thinking": b"x"}}, "not JSON"),
    "not a number": (templates.QWEN_3, {"arguments": {"enable_thinking": math.nan}}, "not JSON"),
    "half a letter": (templates.QWEN_3, {"arguments": {"enable_thinking": ["\ud800"]}}, "not UTF-8"),
    "a name that is none": (templates.QWEN_3, {"arguments": {1: 2}}, "its name is no text"),
    "a file without a name": (templates.QWEN_3, {"template": ""}, "is no name of a file"),
    "an argument in a branch that no chat takes": (
        "{% if false %}{{ foo }}{% endif %}" + templates.CHATML,
        {"arguments": {"foo": "a"}},
        "would not reach the model",
    ),
    "an argument that the template overwrites": (
        "{% set foo = 'mine' %}{{ foo }}" + templates.CHATML,
        {"arguments": {"foo": "a"}},
        'never uses the argument "foo"',
    ),
    "an argument that decides nothing as it is": (
        templates.QWEN_3 + "{% if x %}{% endif %}",
        {"arguments": {"enable_thinking": False, "x": 1}},
        'the argument "x" (1) would not reach the model',
    ),
    "what transformers takes for itself": (
        "{% if padding %}a{% endif %}{{ max_length }}" + templates.CHATML,
        {"arguments": {"padding": True}},
        'never uses the argument "padding"',
    ),
    "a text for false": (
        templates.QWEN_3 + "{% if enable_thinking %}b{% endif %}",
        {"arguments": {"enable_thinking": "False"}},
        "right is false (in Python False)",
    ),
    "a text for nothing": (
        "{% if tower %}the tower{% endif %}" + templates.CHATML,
        {"arguments": {"tower": "null"}},
        "right is null (in Python None)",
    ),
    "a date beside one as text": (
        templates.LLAMA_3,
        {"arguments": {"date_string": "1 Jan 2000"}, "date": DAY},
        "asks for no date",
    ),
    "a date in a branch that no chat takes": (
        "{% if false %}{{ strftime_now('%Y') }}{% endif %}" + templates.CHATML,
        {"date": DAY},
        "asks for no date",
    ),
    "no date": (templates.SMOLLM2, {"date": DAY}, "asks for no date"),
    "a date of another form": (templates.GPT_OSS, {"date": "29.11.2026"}, "right is YYYY-MM-DD"),
    "a day that is none": (templates.GPT_OSS, {"date": "2026-02-30"}, "right is YYYY-MM-DD"),
    "no template": ("", {"date": DAY}, "without a chat template; give one too"),
    "no template for arguments": ("", {"arguments": {"a": 1}}, "without a chat template; give one too"),
    "a template that is none": ("", {"template": "{% for m in %}"}, "line 1: not a chat template"),
    "a template that shows nothing": ("", {"template": "{{ bos_token }}"}, "does not reach the model"),
}


@pytest.mark.parametrize(
    ("template", "arguments"),
    [
        ("{{ reasoning or 'low' }}" + templates.CHATML, {"reasoning": "none"}),
        ("{% if kept %}{{ messages[1].reasoning_content }}{% endif %}" + templates.CHATML, {"kept": True}),
        (templates.SMOL_VLM + "{% if short %}Briefly.{% endif %}", {"short": True}),
        (templates.QWEN_3, {"enable_thinking": True}),  # the default, spelled out
        (
            "{% if effort | default('low') not in ('low', 'high') %}{{ raise_exception('no') }}{% endif %}"
            + templates.CHATML,
            {"effort": "low"},
        ),
        (
            "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + templates.CHATML,
            {"tools": [{"a": 1}]},
        ),
    ],
)
def test_what_may_reach_the_model_is_taken(template: str, arguments: dict[str, Any]) -> None:
    tokenizer = fresh(template)
    set_chat_format(tokenizer, arguments=arguments)
    assert chat_format(tokenizer).arguments == arguments
    assert chat_format(tokenizer).asked == chat_format(tokenizer).count == 0


def test_a_date_is_recorded_where_a_chat_of_the_run_asked_for_it() -> None:
    tokenizer = fresh(
        "{% if messages[0].role != 'system' %}{{ strftime_now('%Y') }}{% endif %}" + templates.CHATML
    )
    set_chat_format(tokenizer)
    for roles, dated in ((("system", "user"), False), (("user",), True), (("system", "user"), False)):
        noted = NotedChats(tokenizer)
        render(tokenizer, chat(*roles))
        assert noted.record is not None
        assert (noted.record.date is not None) == dated
    set_chat_format(tokenizer, date=DAY)
    noted = NotedChats(tokenizer)
    render(tokenizer, chat("system", "user"))
    with pytest.raises(ModelError, match="asks for no date in these chats"):
        _ = noted.record
    assert noted.so_far is not None
    assert noted.so_far.date is None
    render(tokenizer, chat("user"))
    assert noted.record is not None
    assert noted.record.date == DAY


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_reach_the_model_is_refused(name: str) -> None:
    template, given, words = REFUSED[name]
    with pytest.raises(ModelError) as raised:
        set_chat_format(fresh(template or None), **given)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_template_comes_from_a_file(tmp_path: Path) -> None:
    plain, wrapped, other = (
        tmp_path / name for name in ("chat.jinja", "tokenizer_config.json", "other.json")
    )
    plain.write_text(templates.CHATML, encoding="utf-8")
    wrapped.write_text(json.dumps({"chat_template": templates.CHATML}), encoding="utf-8")
    other.write_text("[]", encoding="utf-8")
    for file in (plain, str(wrapped), templates.CHATML):
        _, tokenizer = load_model("lab:moe", device="cpu", chat_template=file)
        assert render(tokenizer, chat("user", user="hi"))[0].startswith("<|im_start|>user\nhi")
    assert render(load_tokenizer("lab:moe", chat_template=plain), chat("user"))[0].startswith("<|im_start|>")
    (tmp_path / "empty").write_text(" \n")
    for file, words in (
        (other, 'no text under "chat_template"'),
        (tmp_path / "nowhere.jinja", "no such file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "empty", "is empty"),
    ):
        with pytest.raises(ModelError, match=words) as raised:
            load_model("lab:moe", device="cpu", chat_template=file)
        assert str(file) in str(raised.value)


def test_chats_are_noted_and_texts_are_not() -> None:
    tokenizer = fresh(templates.SMOLLM2)
    noted = NotedChats(tokenizer)
    render(tokenizer, "a text")
    assert noted.record is None
    render(tokenizer, chat("user"))
    assert noted.record == noted.so_far == ChatRecord(hashlib.sha256(templates.SMOLLM2.encode()).hexdigest())
    assert NotedChats(tokenizer).record is None


def test_a_copy_of_the_tokenizer_renders_alike() -> None:
    tokenizer = fresh(templates.GPT_OSS)
    set_chat_format(tokenizer, date=DAY)
    copied = copy.deepcopy(tokenizer)
    assert render(copied, chat("user")) == render(tokenizer, chat("user"))
    assert chat_format(copied).date == datetime.date(2026, 11, 29)


def test_what_was_rendered_otherwise_is_named_with_both_values() -> None:
    one = ChatRecord("ab" * 32, {"thinking": True}, DAY)
    dates = "the date that chats were rendered with (2026-11-29 there, 2026-11-30 here)"
    arguments = """the chat template's arguments ({"thinking": true} there, {} here)"""
    texts = "the chat template (sha256 abababababababab… there, cdcdcdcdcdcdcdcd… here)"
    for other, told in (
        (ChatRecord("ab" * 32, {"thinking": True}, "2026-11-30"), (dates, f"--chat-date {DAY}")),
        (ChatRecord("ab" * 32, {}, DAY), (arguments, "--chat-template-arg thinking=true")),
        (ChatRecord("cd" * 32, {}, DAY), (texts, "--chat-template FILE")),
    ):
        assert rendered_otherwise(one.to_json(), other.to_json()) == told
    for value, otherwise in ((True, 1), (False, 0), (1, 1.0), ({"a": [True]}, {"a": [1]})):
        records = [ChatRecord("ab" * 32, {"n": each}).to_json() for each in (value, otherwise)]
        told = rendered_otherwise(*records)
        assert told is not None
        assert told[1].startswith("--chat-template-arg ")
        assert rendered_otherwise(records[0], copy.deepcopy(records[0])) is None
        assert differences({"settings": [value]}, {"settings": [otherwise]})
        assert not differences({"settings": [value]}, {"settings": [value]})
    bare = ChatRecord("ab" * 32, {}, DAY)
    assert rendered_otherwise(bare.to_json(), one.to_json())[1] == "no --chat-template-arg"  # type: ignore[index]
    undated = ChatRecord("ab" * 32, {"thinking": True})
    assert rendered_otherwise(one.to_json(), undated.to_json()) is None
    assert common(undated, one) == one
    assert rendered_otherwise(one.to_json(), None) is None
    two = {"source": one.to_json(), "target": None}
    later = {**two, "source": {**one.to_json(), "date": "2026-11-30"}}
    assert rendered_otherwise(two, later) == (dates, f"--source-chat-date {DAY}")
    assert str(one) == f"the chat template abababab…, thinking=true, the date {DAY}"
