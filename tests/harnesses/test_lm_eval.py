"""lm-evaluation-harness's model `steersman`: unsteered `hf` to the bit, steered as everywhere else."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval", reason="lm-eval is not installed (make test-harness)")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

import families as f
from steersman import ExpertEdit, ResidualEdit, Steering
from steersman.errors import ArtifactError, ModelError, PairsError, SteeringNotApplied, WeightsMismatch
from steersman.evaluation.arms import Arm, Subject
from steersman.evaluation.condition import Condition
from steersman.evaluation.tasks import load_task
from steersman.harnesses.lm_eval import OF_ASKING, OF_OPENING, SteeredHFLM

SCOPES = ("all", "prompt", "generated", "answer")
CONTEXTS = ("w7 w9", "w11 w5 w8 w21 w30 w17", "w40 w41 w42", "w7 w9")
CONTINUATIONS = (" w12 w13 w14", " w50", " w33 w34 w35 w36 w37", " w12 w13 w15")
"""Of unlike length; the first and the last share a forward."""


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, place) for place, given in enumerate(arguments)]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = ["<pad>", "<unk>", "<end>", *(f"w{number}" for number in range(3, f.VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )


@functools.cache
def plan(family: str, scope: Any) -> Steering:
    model = f.shared(family)
    base = Steering.from_experts(model, activate={0: [1]}, deactivate={1: [2, 3]}, scope=scope)
    direction = torch.randn(f.WIDTH, generator=torch.Generator().manual_seed(0))
    vector = ResidualEdit({1: direction}, 0.5, scope)
    return Steering((*base.edits, vector), base.architecture, base.weights_id)


def steered(family: str, steering: Steering | None, **options: Any) -> SteeredHFLM:
    return SteeredHFLM(f.shared(family), steering, tokenizer=tokenizer(), **{"batch_size": 3, **options})


# ---------------------------------------------------------------- unsteered


@pytest.mark.parametrize("batch_size", [1, 7])
def test_unsteered_it_is_hf_to_the_bit(checkpoint: str, batch_size: int) -> None:
    options = {"dtype": "float32", "batch_size": batch_size, "device": "cpu"}
    hf = HFLM(pretrained=checkpoint, **options)
    task = load_task("lab:faithfulness/test", limit=12)
    prompts = [hf.apply_chat_template(item.content) for item in task]
    sides = [
        (prompt, " " + a) for prompt, i in zip(prompts, task, strict=True) for a in (i.positive, i.negative)
    ]
    likelihoods = asked("loglikelihood", *sides)
    answers = asked(
        "generate_until", *((prompt, {"until": ["works"], "max_gen_toks": 9}) for prompt in prompts)
    )
    texts = asked("loglikelihood_rolling", *((prompt,) for prompt in prompts))
    for pretrained in (checkpoint, "lab:moe"):
        own = SteeredHFLM(pretrained=pretrained, **options)
        assert own.loglikelihood(likelihoods) == hf.loglikelihood(likelihoods)
        assert own.generate_until(answers) == hf.generate_until(answers)
        assert own.loglikelihood_rolling(texts) == hf.loglikelihood_rolling(texts)
        assert own.get_model_info()["steersman"]["steering"] is None


# ---------------------------------------------------------------- steered


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_likelihoods_under_every_scope_are_those_of_the_evaluation(family: str, scope: str) -> None:
    condition = Condition(Subject(f.shared(family), tokenizer()), Arm("it", plan(family, scope)))
    base = Condition(Subject(f.shared(family), tokenizer()), Arm("base", None))
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    split = [list(column) for column in zip(*((c, [a.strip()]) for c, a in pairs), strict=True)]
    expected = [each for (each,) in condition.log_likelihoods(*split)]
    unsteered = [each for (each,) in base.log_likelihoods(*split)]
    for batch_size in (1, 3):
        own = steered(family, plan(family, scope), batch_size=batch_size)
        found = own.loglikelihood(asked("loglikelihood", *pairs))
        assert [value for value, _ in found] == pytest.approx([e.total for e in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [e.greedy for e in expected]
        assert own.receipt == {"router:0": (n := tokens_in(scope)), "router:1": n, "block_output:1": n}
    moved = [abs(e.total - b.total) > 1e-3 for e, b in zip(expected, unsteered, strict=True)]
    assert moved == [True, scope != "generated", True, True]  # one token is not fed back


def tokens_in(scope: str) -> int:
    """Tokens of the contexts and continuations in scope, one by one; the shared forward counts once."""
    total = 0
    for context, continuation in list(zip(CONTEXTS, CONTINUATIONS, strict=True))[:-1]:
        prompt, answer = len(context.split()), len(continuation.split())
        total += {"all": prompt + answer - 1, "prompt": prompt, "generated": answer - 1, "answer": answer}[
            scope
        ]
    return total


def test_shared_tokens_with_another_prompt_are_steered_apart() -> None:
    """The same tokens, parted elsewhere: `hf` would answer both by one forward."""
    pairs = [("w7 w9 w12", " w13"), ("w7", " w9 w12 w13"), ("w7 w9", " w12 w14")]
    own = steered("qwen3_moe", plan("qwen3_moe", "prompt"))
    together = own.loglikelihood(asked("loglikelihood", *pairs))
    alone = [own.loglikelihood(asked("loglikelihood", pair))[0] for pair in pairs]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-5)
    whole = own.loglikelihood(asked("loglikelihood", ("w7 w9", " w12 w13")))[0][0]
    assert abs(whole - own.loglikelihood(asked("loglikelihood", ("w7 w9 w12", " w13")))[0][0]) > 1e-3


@pytest.mark.parametrize("scope", SCOPES)
def test_a_rolling_text_is_the_answer_to_its_first_token(scope: str) -> None:
    texts = ["w9 w30 w31 w8", "w5 w6"]
    arm = Arm("it", plan("gpt_oss", scope))
    condition = Condition(Subject(f.shared("gpt_oss"), tokenizer()), arm)
    expected = [
        -each.negative_log_likelihood for each in condition.readings([f"<end> {text}" for text in texts])
    ]
    own = steered("gpt_oss", plan("gpt_oss", scope))
    found = own.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
    assert found == pytest.approx(expected, abs=1e-4)  # the prefix token is the tokenizer's end token


def test_a_long_text_is_read_in_windows_each_with_its_first_token_for_a_prompt() -> None:
    model, steering = f.shared("qwen3_moe"), plan("qwen3_moe", "generated")
    ids = f.token_ids(1, 11)[0].tolist()
    text = " ".join(f"w{number}" for number in ids)
    own = steered("qwen3_moe", steering, max_length=4)
    (found,) = own.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    whole, expected = [2, *ids], 0.0
    for fed, wanted in (((0, 4), (1, 5)), ((4, 8), (5, 9)), ((7, 11), (9, 12))):
        with torch.no_grad(), steering.apply(model, prompt_lengths=[1]):
            log_p = model(torch.tensor([whole[slice(*fed)]])).logits[0].log_softmax(-1)
        answers = whole[slice(*wanted)]
        expected += float(log_p[-len(answers) :][range(len(answers)), answers].sum())
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_context_that_is_too_long_is_cut_as_hf_cuts_it() -> None:
    pair = ("w7 w9 w11 w12 w13", " w14 w15")
    own, short = (steered("olmoe", plan("olmoe", "prompt"), max_length=n) for n in (4, 64))
    (cut,) = own.loglikelihood(asked("loglikelihood", pair))
    (fitting,) = short.loglikelihood(asked("loglikelihood", ("w11 w12 w13", " w14 w15")))
    assert cut == pytest.approx(fitting, abs=1e-5)
    assert own.receipt == short.receipt == {"router:0": 3, "router:1": 3, "block_output:1": 3}


@pytest.mark.parametrize("scope", SCOPES)
def test_answers_under_every_scope_are_those_of_generate(scope: str) -> None:
    model = f.shared("qwen3_moe")
    own = steered("qwen3_moe", plan("qwen3_moe", scope), batch_size=1)
    found = own.generate_until(
        asked("generate_until", *((context, {"until": [], "max_gen_toks": 5}) for context in CONTEXTS))
    )
    for context, text in zip(CONTEXTS, found, strict=True):
        ids = tokenizer()(context, return_tensors="pt")["input_ids"]
        with torch.no_grad(), plan("qwen3_moe", scope).apply(model):
            written = model.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0)
        assert text == tokenizer().decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_strength_0_of_one_row_is_hf_to_the_bit() -> None:
    pairs = asked("loglikelihood", *zip(CONTEXTS, CONTINUATIONS, strict=True))
    hf = HFLM(pretrained=f.shared("gpt_oss"), tokenizer=tokenizer(), batch_size=1)
    own = steered("gpt_oss", 0 * plan("gpt_oss", "all"), batch_size=1)
    assert own.loglikelihood(pairs) == hf.loglikelihood(pairs)
    assert own.receipt == {"router:0": 17, "router:1": 17, "block_output:1": 17}


def test_an_automatic_batch_size() -> None:
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    by_hand, found = (
        steered("olmoe", plan("olmoe", "answer"), batch_size=size, max_batch_size=2) for size in (2, "auto")
    )
    expected = by_hand.loglikelihood(asked("loglikelihood", *pairs))
    assert found.loglikelihood(asked("loglikelihood", *pairs)) == expected
    texts = asked("loglikelihood_rolling", *((context,) for context in CONTEXTS))
    assert found.loglikelihood_rolling(texts) == pytest.approx(by_hand.loglikelihood_rolling(texts), abs=1e-5)
    assert found.receipt == by_hand.receipt


# ---------------------------------------------------------------- what must not pass for steered


def test_what_cannot_be_applied_raises() -> None:
    own = steered("qwen3_moe", plan("qwen3_moe", "generated"))
    with pytest.raises(SteeringNotApplied, match="every continuation has one token"):
        own.loglikelihood(asked("loglikelihood", ("w7 w9", " w12"), ("w7", " w9")))
    with pytest.raises(SteeringNotApplied, match="selects nothing"):
        own.generate_until(asked("generate_until", ("w7 w9", {"until": [], "max_gen_toks": 1})))
    with pytest.raises(SteeringNotApplied, match="does not tell the prompt's length"):
        own._model_call(torch.tensor([[7, 9]]))
    with pytest.raises(PairsError, match="adds no token"):
        own.loglikelihood(asked("loglikelihood", ("w7 w9", "")))


def test_a_layer_that_is_gone_round_raises() -> None:
    model = f.tiny("qwen3_moe")
    own = SteeredHFLM(model, Steering.from_experts(model, activate={0: [1]}), tokenizer=tokenizer())
    model.model.layers[0].forward = lambda states, *given, **named: states
    with pytest.raises(SteeringNotApplied, match="planned but not run"):
        own.loglikelihood(asked("loglikelihood", ("w7 w9", " w12 w13")))


def test_a_plan_for_other_weights_is_refused_at_once() -> None:
    other = f.tiny("qwen3_moe", seed=1)
    with pytest.raises(WeightsMismatch):
        SteeredHFLM(other, plan("qwen3_moe", "all"), tokenizer=tokenizer())
    own = SteeredHFLM(other, plan("qwen3_moe", "all"), "architecture", tokenizer=tokenizer())
    own.loglikelihood(asked("loglikelihood", ("w7 w9", " w12 w13")))
    assert own.get_model_info()["steersman"]["steering"]["match"] == "architecture"


def cached(own: Any, file: Path, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    lm = CachingLM(own, str(file))
    try:
        return lm.loglikelihood(asked("loglikelihood", *pairs))
    finally:
        lm.dbdict.close()


def test_a_cache_of_answers_under_another_plan_is_refused(tmp_path: Path) -> None:
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    some, other, none = (
        steered("qwen3_moe", given) for given in (plan("qwen3_moe", "all"), plan("qwen3_moe", "prompt"), None)
    )
    first = cached(some, tmp_path / "some.db", pairs)
    before = dict(some.receipt)
    assert cached(some, tmp_path / "some.db", pairs) == first
    assert some.receipt == before  # nothing ran again
    bare = none.loglikelihood(asked("loglikelihood", *pairs))
    assert [cached(none, tmp_path / "none.db", pairs) for _ in range(2)] == [bare, bare]
    for own, file in ((other, "some.db"), (none, "some.db"), (some, "none.db")):
        with pytest.raises(ArtifactError, match=r"\.db: this cache holds answers"):
            cached(own, tmp_path / file, pairs)


def test_the_record_names_plan_and_receipt(by_hand: Path) -> None:
    own = SteeredHFLM(pretrained="lab:moe", steering=f"{by_hand}", batch_size=2)
    own.loglikelihood(asked("loglikelihood", ("tell me the depth", " of the garden .")))
    said = own.get_model_info()["steersman"]["steering"]
    assert said["fingerprint"] == Steering.from_pretrained(by_hand).fingerprint
    assert said["receipt"] == {"router:1": 7, "router:3": 7}
    assert isinstance(own.steering.edits[0], ExpertEdit)


# ---------------------------------------------------------------- what is asked is carried out, or refused


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' or not loop.last %}"
    "<|{{ m['role'] }}|> {{ m['content'] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %} <think>{% endif %}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    + TEMPLATE
)
MUTE = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }} {% endif %}{% endfor %}"
CHAT = [{"role": "system", "content": "w3 w4"}, {"role": "user", "content": "w5 w6"}]


def chatting(template: Any, **options: Any) -> SteeredHFLM:
    own = copy.deepcopy(tokenizer())
    own.chat_template = template
    return SteeredHFLM(f.shared("olmoe"), None, tokenizer=own, batch_size=1, **options)


def test_chats_are_those_of_hf_and_of_steersman() -> None:
    own = copy.deepcopy(tokenizer())
    own.chat_template = TEMPLATE
    hf, ours = HFLM(pretrained=f.shared("olmoe"), tokenizer=own, batch_size=1), chatting(TEMPLATE)
    shots = [*CHAT, {"role": "assistant", "content": "w7"}, {"role": "user", "content": "w8"}]
    for chat in (CHAT, CHAT[1:], shots):
        assert ours.apply_chat_template(chat) == hf.apply_chat_template(chat)
    for said in ("w7 w8", "w7 w8 "):
        begun = [*CHAT, {"role": "assistant", "content": said}]
        assert ours.apply_chat_template(begun, add_generation_prompt=False) == hf.apply_chat_template(
            begun, add_generation_prompt=False
        )


def test_an_answer_that_is_begun_is_rendered_as_every_chat_is() -> None:
    parts = TEMPLATE.replace("m['content']", "m['content'][0].text")
    ours = chatting("{{ strftime_now('%Y-%m-%d ') }}" + parts, chat_date="2026-11-29")
    assert "chats" not in ours.get_model_info()["steersman"]
    begun = [*CHAT, {"role": "assistant", "content": "w7 w8"}]
    text = ours.apply_chat_template(begun, add_generation_prompt=False)
    assert text == "2026-11-29 <|system|> w3 w4 <end> <|user|> w5 w6 <end> <|assistant|> w7 w8"
    assert ours.get_model_info()["steersman"]["chats"]["date"] == "2026-11-29"


@pytest.mark.parametrize(
    ("template", "why"), [(NO_SYSTEM, "no system messages"), (MUTE, "system"), (None, "no chat template")]
)
def test_a_message_that_does_not_arrive_is_refused(template: Any, why: str) -> None:
    """`hf` leaves a system message out where the template refuses it."""
    for chat, prompt in ((CHAT, True), ([*CHAT, {"role": "assistant", "content": "w7"}], False)):
        with pytest.raises((PairsError, ModelError), match=why):
            chatting(template).apply_chat_template(chat, add_generation_prompt=prompt)


def test_a_template_by_name_is_the_one_that_is_used() -> None:
    both = {"default": TEMPLATE, "terse": TEMPLATE.replace("<end> ", "")}
    for name in ("terse", "default", "terse"):
        ours = chatting(both)
        assert ours.chat_template(name) == both[name]
        assert ("<end>" in ours.apply_chat_template(CHAT)) == (name == "default")
        assert ours.chat_template(name) == both[name]
    with pytest.raises(ModelError, match="--apply_chat_template rag: the tokenizer has only default, terse"):
        ours.chat_template("rag")
    with pytest.raises(ModelError, match="no chat templates by name"):
        chatting(TEMPLATE).chat_template("rag")


def test_template_arguments_are_used_or_refused() -> None:
    assert (
        chatting(TEMPLATE, chat_template_args={"thinking": True})
        .apply_chat_template(CHAT)
        .endswith("<think>")
    )
    assert (
        not chatting(TEMPLATE, chat_template_args={"thinking": False})
        .apply_chat_template(CHAT)
        .endswith("k>")
    )
    with pytest.raises(ModelError, match='never uses the argument "thinkin"'):
        chatting(TEMPLATE, chat_template_args={"thinkin": True})
    with pytest.raises(ModelError, match='never uses the argument "enable_thinking"'):
        chatting(TEMPLATE, enable_thinking=False)


def test_a_template_of_ones_own_and_its_date(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ strftime_now('%d') }} " + TEMPLATE)
    ours = chatting(TEMPLATE, chat_template=str(tmp_path / "own.jinja"), chat_date="2024-02-03")
    assert ours.apply_chat_template(CHAT).startswith("03 <|system|>")
    assert ours.get_model_info()["steersman"]["chats"]["date"] == "2024-02-03"


def test_every_argument_of_hf_is_decided() -> None:
    fields = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    assert fields <= OF_OPENING | OF_ASKING  # of an older version there may be fewer
    assert not OF_OPENING & OF_ASKING


@pytest.mark.parametrize("name", ["peft", "revision", "trust_remote_code", "gguf_file", "load_in_8bit"])
def test_arguments_that_an_open_model_would_not_follow_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}=.*: this model is open already"):
        SteeredHFLM("lab:moe", **{name: "x"})
    with pytest.raises(ModelError, match=f"{name}=.*: this model is open already"):
        steered("olmoe", None, **{name: "x"})


def test_a_device_and_a_dtype_of_an_open_model() -> None:
    with pytest.raises(ModelError, match="dtype=float16: this model is open already"):
        steered("olmoe", None, dtype="float16")
    with pytest.raises(ModelError, match="device=cuda:0: this model is open already, on cpu"):
        steered("olmoe", None, device="cuda:0")
    assert SteeredHFLM("lab:moe", dtype="bfloat16", device="cuda:0").model.dtype == torch.bfloat16


@pytest.mark.parametrize("steering", [None, "all"])
@pytest.mark.parametrize(
    "asked_for",
    [{"max_time": 3.0}, {"min_length": 4}, {"num_return_sequences": 2}, {"output_scores": True}],
)
def test_generation_arguments_that_cannot_be_carried_out(asked_for: Any, steering: Any) -> None:
    own = steered("olmoe", plan("olmoe", steering) if steering else None)
    (name,) = asked_for
    with pytest.raises(PairsError, match=f"--gen_kwargs {name}="):
        own.generate_until(asked("generate_until", ("w7", {"until": [], "max_gen_toks": 2, **asked_for})))


def test_generation_arguments_act() -> None:
    own = steered("olmoe", None)
    base = {"until": [], "max_gen_toks": 3}
    (plain,) = own.generate_until(asked("generate_until", ("w7", base)))
    first = tokenizer()(plain)["input_ids"][0]
    for more in (
        {"suppress_tokens": [first]},
        {"bad_words_ids": [[first]]},
        {"sequence_bias": [[[first], -99.0]]},
    ):
        (other,) = own.generate_until(asked("generate_until", ("w7", {**base, **more})))
        assert other.split()[0] != plain.split()[0]
    with pytest.raises(ValueError, match="repetition_penality"):  # transformers knows its own
        own.generate_until(asked("generate_until", ("w7", {**base, "repetition_penality": 2.0})))


def test_a_checkpoints_own_settings_are_said_or_refused(checkpoint: str, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    path = folder / "generation_config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "repetition_penalty": 1.1, "num_beams": 2}))
    said = SteeredHFLM(str(folder), device="cpu").get_model_info()["steersman"]
    assert said["generation"] == {"repetition_penalty": 1.1, "num_beams": 2}
    path.write_text(json.dumps({**own, "bad_words_ids": 3}))
    with pytest.raises(ModelError, match=r"its generation_config\.json sets: bad_words_ids 3"):
        SteeredHFLM(str(folder), device="cpu").generate_until(
            asked("generate_until", ("w7", {"max_gen_toks": 2}))
        )
    path.write_text(json.dumps({**own, "max_time": 3.0}))
    with pytest.raises(ModelError, match=r"sets max_time to 3(\.0)?, which ends answers by the clock"):
        SteeredHFLM(str(folder), device="cpu")
