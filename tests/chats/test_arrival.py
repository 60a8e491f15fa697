"""What a user wrote reaches the model in every published form of template, or an error says what does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chats import templates
from chats.templates import chat, tokenizer_of
from steersman.chats.arrival import render_chat, shows
from steersman.chats.format import chat_format
from steersman.errors import ModelError, PairsError
from steersman.rendering import encode, render


def _each(shown: str, after: str = "") -> str:
    """A template that shows this of every message, which it calls m."""
    return f"{{% for m in messages %}}<|{{{{ m.role }}}}|> {shown} <|end|> {{% endfor %}}{after}"


SHOWN: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "ChatML": (templates.CHATML, [("user",), ("system", "user", "assistant"), ("developer", "tool")]),
    "SmolLM2": (templates.SMOLLM2, [("user",), ("system", "user"), ("user", "assistant", "user")]),
    "Llama 3": (
        templates.LLAMA_3,
        [("user",), ("system", "user", "assistant"), ("user", "assistant", "tool")],
    ),
    "Gemma 2": (templates.GEMMA_2, [("user",), ("user", "assistant"), ("user", "assistant", "user")]),
    "Mistral": (templates.MISTRAL, [("user",), ("system", "user"), ("user", "assistant")]),
    "GPT-OSS": (
        templates.GPT_OSS,
        [("developer", "user"), ("system", "user", "assistant"), ("user", "tool")],
    ),
    "DeepSeek R1": (templates.DEEPSEEK_R1, [("user",), ("system", "user", "assistant", "user")]),
    "Qwen 3": (templates.QWEN_3, [("user",), ("system", "user", "assistant", "user")]),
    "SmolVLM": (templates.SMOL_VLM, [("user",), ("system", "user", "assistant"), ("user", "assistant")]),
    "Llama Guard": (templates.LLAMA_GUARD, [("user",), ("user", "assistant")]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_every_message_is_in_what_is_rendered(name: str) -> None:
    template, shapes = SHOWN[name]
    for roles in shapes:
        messages = chat(*roles)
        text, add_special = render(tokenizer_of(template), messages)
        assert not add_special
        assert all(message["content"] in text for message in messages)


LOST = {
    "no developer": (templates.NO_DEVELOPER, ("developer", "user"), 1, "the role system for it"),
    "system only before the user's last words": (
        templates.MISTRAL,
        ("system", "user", "assistant"),
        1,
        "a chat that ends with the user",
    ),
    "no tool": (templates.MISTRAL, ("user", "assistant", "tool"), 3, "the role user for it"),
    "a second instruction": (templates.GPT_OSS, ("developer", "system", "user"), 2, "the role user for it"),
    "a tool of a reasoning model": (templates.DEEPSEEK_R1, ("user", "assistant", "tool"), 3, "a template"),
    "nobody": ("{{ bos_token }}Hello", ("user",), 1, "a template that shows it"),
    "the first alone": ("{{ messages[0]['content'] }}", ("system", "user"), 2, "a template that shows it"),
}


@pytest.mark.parametrize("name", LOST)
def test_a_message_that_is_left_out_is_an_error(name: str) -> None:
    template, roles, number, right = LOST[name]
    tokenizer = tokenizer_of(template)
    with pytest.raises(PairsError) as raised:
        render(tokenizer, chat(*roles))
    line = str(raised.value)
    assert line.startswith(f"message {number} (")
    assert f", of the role {roles[number - 1]}, does not reach the model: the chat template of" in line
    assert right in line.partition("right is")[2]
    assert not shows(tokenizer, chat(*roles))
    with pytest.raises(PairsError, match="pair 3: message"):
        encode(tokenizer, chat(*roles), None, where="pair 3")


CHANGED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "an earlier thought": (
        templates.QWEN_3,
        chat("user", "assistant", "user", assistant="<think>\nhidden plan\n</think>\n\nYes."),
        "<think>",
    ),
    "a last thought": (
        templates.DEEPSEEK_R1,
        chat("user", "assistant", assistant="<think>hidden plan</think>Yes."),
        "<think>hidden",
    ),
    "lower case": ("{% for m in messages %}{{ m['content'] | lower }}{% endfor %}", chat("user"), "Words"),
    "cut off": (
        "{% for m in messages %}{{ m['content'][:40] }}{% endfor %}",
        chat("user", user="ab " * 30 + "End"),
        "End",
    ),
    "replaced": (
        "{% for m in messages %}{{ m['content'] | replace('w', 'v') }}{% endfor %}",
        chat("user", user="a cow"),
        "cow",
    ),
    "short and cut, long and whole": (
        _each("{{ m.content if m.content | length > 4 or m.content | length < 3 else m.content[:3] }}"),
        chat("user", user="then"),
        "then",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_words_that_are_changed_are_an_error(name: str) -> None:
    template, messages, word = CHANGED[name]
    with pytest.raises(PairsError) as raised:
        render(tokenizer_of(template), messages)
    assert "does not reach the model as it is written" in str(raised.value)
    assert json.dumps(word) in str(raised.value)


ELSEWHERE: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "a role's name": (
        _each("{% if m.content | length > 4 %}{{ m.content }}{% endif %}"),
        chat("system", "user", system="user"),
    ),
    "what another says": (
        _each("{% if not m.content.startswith('Be') %}{{ m.content }}{% endif %}"),
        chat("system", "user", system="Be kind", user="What is it to Be kind"),
    ),
    "the same said before": (
        "{% set ns = namespace(said=[]) %}"
        + _each(
            "{% if m.content not in ns.said %}{{ m.content }}{% endif %}"
            "{% set ns.said = ns.said + [m.content] %}"
        ),
        [*chat("user", user="hi"), *chat("assistant"), *chat("user", user="hi")],
    ),
    "the template's own words": (_each("{{ m.content | lower }}", "Hi"), chat("user", user="Hi")),
    "a template that knows marks": (
        _each(
            "{% if 'mark' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content[:5] }}", "seven"
        ),
        chat("user", user="it is seven"),
    ),
    "a template that drops digits' messages": (
        _each("{% if '0' not in m.content and m.content | length < 6 %}{{ m.content }}{% endif %}", "of 10"),
        chat("user", user="of 10"),
    ),
    "no space between words": (_each("{{ m.content | replace(' ', '') }}"), chat("user", user="def f():")),
    "no line break between words": (
        _each("{{ m.content | replace('\n', '') }}"),
        chat("user", user="one\ntwo"),
    ),
    "no tab between words": (_each("{{ m.content.split('\t') | join }}"), chat("user", user="one\ttwo")),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_words_that_stand_elsewhere_are_no_proof(name: str) -> None:
    template, messages = ELSEWHERE[name]
    with pytest.raises(PairsError, match="does not reach the model as it is written"):
        render(tokenizer_of(template), messages)


KEPT = {
    "words around it that depend on it": (
        _each("{{ m.content | length }} {{ m.content }} {{ m.content | length }}"),
        chat("user", "assistant", user="yes", assistant="no"),
    ),
    "other white space": (_each("{{ m.content.split() | join('\n') }}"), chat("user", user="two  words")),
    "a fitting case": (_each("{{ m.content | upper }}"), chat("user", user="YES")),
    "a template that knows marks": (
        _each("{% if 'mark' in m.content %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"),
        chat("user"),
    ),
    "a template for short texts": (
        _each("{{ m.content if m.content | length < 10 }}"),
        chat("user", user="short"),
    ),
    "trimmed": (templates.GEMMA_2, chat("user", user="  spaces around \n")),
    "as JSON": (templates.GPT_OSS, chat("user", "tool", tool='a "quoted"\nline — ünïcode')),
    "a thought in other whitespace": (
        templates.QWEN_3,
        chat("user", "assistant", assistant="<think>plan</think>Yes."),
    ),
    "the template's own words": (templates.CHATML, chat("user", user="<|im_start|>user")),
}


@pytest.mark.parametrize("name", KEPT)
def test_whitespace_and_quoting_take_nothing_away(name: str) -> None:
    template, messages = KEPT[name]
    assert render(tokenizer_of(template), messages)[0]


def test_texts_are_given_as_parts_where_a_template_wants_parts() -> None:
    tokenizer = tokenizer_of(templates.SMOL_VLM)
    messages = chat("system", "user")
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    expected = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, messages) == expected
    assert "Words 2 of user." in expected
    encoded = encode(tokenizer, chat("user", "assistant", assistant="Yes"), None, where="here")
    assert tokenizer.decode([encoded.ids[place] for place in encoded.target]) == "Yes"


USERS_PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("whole", ["{{ m.content }}", "{{ 'SYS ' + m.content }}", "{{ m.content | tojson }}"])
def test_parts_are_for_the_roles_that_want_them(whole: str) -> None:
    template = _each(f"{{% if m.role == 'user' %}}{USERS_PARTS}{{% else %}}{whole}{{% endif %}}")
    text = render_chat(tokenizer_of(template), chat("system", "user", "assistant", "user"))
    assert "'text'" not in text
    assert '"text"' not in text
    for words in ("Words 1 of system.", "Words 2 of user.", "Words 3 of assistant.", "Words 4 of user."):
        assert words in text


def test_parts_that_are_shown_as_a_whole_are_an_error() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    for shown in ("{{ m.content }}", "{{ m.content | tojson }}", "{{ m.content | tojson(indent=2) }}"):
        with pytest.raises(PairsError, match=r"message 1 .* does not reach the model"):
            render_chat(tokenizer_of(_each(shown)), parts)


def test_the_proof_is_made_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = templates.tokenizer_of.__wrapped__(templates.SMOLLM2)
    made: list[int] = []
    own = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: made.append(1) or own(*a, **k))
    for number in range(10):
        render(tokenizer, chat("user", user=f"question {number}"))
    assert len(made) == 11
    render(tokenizer, chat("user", "assistant"))
    assert len(made) == 13
    tokenizer.chat_template = templates.MISTRAL  # another template is another proof
    with pytest.raises(PairsError):
        render(tokenizer, chat("system", "user", "assistant"))
    assert chat_format(tokenizer).count == 11


def test_what_a_template_refuses_is_told_in_its_own_words() -> None:
    for roles, words in (
        (("system", "user"), "System role not supported"),
        (("user", "user"), "must alternate"),
    ):
        with pytest.raises(PairsError, match=f"refuses the messages .*{words}"):
            render(tokenizer_of(templates.GEMMA_2), chat(*roles))


def test_tool_calls_and_other_fields_are_proven_too() -> None:
    called = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Ghent"}}}
    messages = [*chat("user"), {"role": "assistant", "content": "", "tool_calls": [called]}, *chat("tool")]
    with pytest.raises(
        PairsError, match=r"message 2 \(.*\), of the role assistant, does not reach the model"
    ):
        render_chat(tokenizer_of(templates.CHATML), messages)
    showing = templates.CHATML.replace(
        "+ m['content'] +", "+ m['content'] + (m.tool_calls | tojson if m.tool_calls else '') +"
    )
    assert "Ghent" in render_chat(tokenizer_of(showing), messages)


def test_without_a_template_messages_are_refused() -> None:
    tokenizer = templates.tokenizer_of.__wrapped__(None)
    with pytest.raises(ModelError, match=r"has no chat template.*--chat-template FILE"):
        render(tokenizer, chat("user"))
    assert render(tokenizer, "a text") == ("a text", True)
