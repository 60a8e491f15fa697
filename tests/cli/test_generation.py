"""generate: base beside steered, receipts, prompts of every form, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from cli.command_line import run, save_tiny
from steersman import RoutingContrast, Steering, lab, load_model
from steersman.steering import sha256_of


@pytest.fixture(scope="module")
def strong(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A steering that changes what a random model writes."""
    folder = tmp_path_factory.mktemp("strong") / "steering"
    RoutingContrast.from_pretrained(contrast).select(activate=4, deactivate=8).save_pretrained(folder)
    return folder


def by_hand(model: Path, text: str, steering: Steering | None, new: int) -> tuple[str, int]:
    """One prompt alone, without padding, through transformers: the answer and the prompt's length."""
    opened, tokenizer = load_model(str(model))
    chat = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    length = inputs["input_ids"].shape[1]

    def written() -> str:
        output = opened.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return tokenizer.decode(output[0, length:], skip_special_tokens=True)

    with torch.inference_mode():
        if steering is None:
            return written(), length
        with steering.apply(opened):
            return written(), length


def test_each_prompt_is_answered_as_if_alone_with_its_own_receipt(tiny: Path, strong: Path) -> None:
    prompts = ["who wrote the book?", "is the town old? " * 4, "the river"]
    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    result = run(
        "generate", tiny, "--steering", strong, "--compare", *options, "--max-new-tokens", 6, "--json"
    ).json
    plan = Steering.from_pretrained(strong)
    assert [item["prompt"] for item in result["items"]] == prompts
    for item in result["items"]:
        assert set(item) == {"prompt", "base", "steered", "receipt"}
        base, length = by_hand(tiny, item["prompt"], None, 6)
        steered, _ = by_hand(tiny, item["prompt"], plan, 6)
        assert (item["base"], item["steered"]) == (base, steered)
        assert item["receipt"]["fingerprint"] == plan.fingerprint
        # Every token that the model reads: the prompt's, and the new ones but the last.
        assert item["receipt"]["tokens"] == {f"router:{layer}": length + 5 for layer in plan.strengths}
        assert all(0 < item["receipt"]["changed"][site] <= length + 5 for site in item["receipt"]["tokens"])
    assert any(item["base"] != item["steered"] for item in result["items"])


def test_a_batch_writes_what_each_prompt_alone_does(tiny: Path, strong: Path) -> None:
    prompts = ["who wrote the book?", "is the town old? " * 4, "the river"]
    options = [option for prompt in prompts for option in ("--prompt", prompt)]
    options = ["--steering", strong, "--compare", *options, "--max-new-tokens", 6, "--json"]
    alone, together = (run("generate", tiny, *options, "--batch-size", size).json["items"] for size in (1, 3))
    for key in ("base", "steered"):
        assert [item[key] for item in alone] == [item[key] for item in together]
    for item in together:
        assert item["receipt"]["prompts"] == 3
        for count in ("tokens", "changed"):
            assert item["receipt"][count] == {
                site: sum(other["receipt"][count][site] for other in alone)
                for site in alone[0]["receipt"][count]
            }


def test_in_words_base_stands_beside_steered(tiny: Path, strong: Path) -> None:
    options = ["--steering", strong, "--prompt", "the river", "--max-new-tokens", 4]
    lines = run("generate", tiny, *options, "--compare").words.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")][:1] == ["prompt"]
    words = "\n".join(lines)
    assert all(line.isprintable() for line in lines)
    assert "\nbase " in words
    assert "\nsteered " in words
    assert "\nreceipt  routing changed at " in words
    assert "\nbase " not in run("generate", tiny, *options).words


def test_steerings_are_dialled_and_summed(tiny: Path, contrast: Path, tmp_path: Path) -> None:
    routing = RoutingContrast.from_pretrained(contrast)
    one, other = routing.select(activate=1), routing.select(deactivate=1)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "a=b@2")  # a path may hold the signs of the form
    options = ["--steering", f"safer={tmp_path}/one@0.5", "--steering", tmp_path / "a=b@2"]
    result = run("generate", tiny, *options, "--prompt", "hi", "--max-new-tokens", 2, "--json").json
    assert result["items"][0]["receipt"]["fingerprint"] == (0.5 * one + other).fingerprint


def test_strength_zero_changes_nothing(tiny: Path, strong: Path) -> None:
    options = ["--steering", f"{strong}@0", "--prompt", "hi", "--compare", "--max-new-tokens", 5, "--json"]
    result = run("generate", tiny, *options).json
    (item,) = result["items"]
    assert item["base"] == item["steered"]
    assert sum(item["receipt"]["changed"].values()) == 0


def test_prompts_of_every_form(tiny: Path, strong: Path, tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    rows = [
        "the river",
        json.dumps({"prompt": "the town"}),
        "",
        json.dumps({"messages": chat}),
        "17",
        "{so to say",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(rows))
    options = ["--steering", strong, "--max-new-tokens", 2, "--batch-size", 2, "--json"]
    result = run("generate", tiny, *options, "--prompts", tmp_path / "prompts.txt").json
    assert [item["prompt"] for item in result["items"]] == ["the river", "the town", chat, "17", "{so to say"]


def test_without_a_steering_the_model_answers_as_it_is(tiny: Path, strong: Path) -> None:
    options = ["--prompt", "the river", "--prompt", "who?", "--max-new-tokens", 4, "--batch-size", 2]
    plain = run("generate", tiny, *options, "--json").json["items"]
    beside = run("generate", tiny, *options, "--steering", strong, "--compare", "--json").json["items"]
    assert plain == [{"prompt": item["prompt"], "base": item["base"]} for item in beside]
    words = run("generate", tiny, *options).words
    assert words.count("\nbase ") == 2
    assert "steered" not in words
    assert "receipt" not in words
    assert "give --steering" in run("generate", tiny, *options, "--compare").error


def test_a_system_message_reaches_the_model(tiny: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    chat += [{"role": "user", "content": "who?"}]
    told = [{"role": "system", "content": "be kind"}]
    rows = [{"prompt": "hi"}, {"messages": chat}]
    (tmp_path / "without.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = [{"messages": [*told, chat[0]]}, {"messages": [*told, *chat]}]
    (tmp_path / "within.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    options = ["--max-new-tokens", 6, "--json", "--prompts"]
    added = run("generate", tiny, *options, tmp_path / "without.jsonl", "--system", "be kind").json
    assert added == run("generate", tiny, *options, tmp_path / "within.jsonl").json
    plain = run("generate", tiny, *options, tmp_path / "without.jsonl").json
    assert [item["base"] for item in added["items"]] != [item["base"] for item in plain["items"]]
    twice = run("generate", tiny, *options, tmp_path / "within.jsonl", "--system", "be kind").error
    assert "within.jsonl:1: has a system message of its own" in twice
    assert "--system is empty" in run("generate", tiny, "--prompt", "hi", "--system", " ").error


def test_a_system_message_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "plain", chat=False)
    assert "has no chat template" in run("generate", model, "--prompt", "hi", "--system", "be kind").error


def test_prompts_from_stdin(tiny: Path) -> None:
    options = ["--prompts", "-", "--max-new-tokens", 2]
    rows = '\ufeffthe river\n\n{"prompt": "Wer wohnt im Süden?"}\n'
    items = run("generate", tiny, *options, "--json", stdin=rows).json["items"]
    assert [item["prompt"] for item in items] == ["the river", "Wer wohnt im Süden?"]
    assert run("generate", tiny, *options).error.startswith("stdin: no prompts in it")
    assert run("generate", tiny, *options, stdin=b"a\n\xff\n").error.startswith("stdin:2: not UTF-8")
    keys = run("generate", tiny, *options, stdin='a\n{"text": "b"}\n').error
    assert keys.startswith("stdin:2: the keys are text")
    pointer = run("generate", tiny, *options, stdin="version https://git-lfs.github.com/spec/v1\noid x\n")
    assert pointer.error.startswith("stdin: a Git LFS pointer")


def test_prompts_of_several_files(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("the river\n")
    options = ["--prompts", tmp_path / "one", "--prompts", "-", "--max-new-tokens", 1]
    items = run("generate", tiny, *options, "--json", stdin="the town\n").json["items"]
    assert [item["prompt"] for item in items] == ["the river", "the town"]
    for twice in ("-", tmp_path / "one"):
        error = run("generate", tiny, *options, "--prompts", twice, stdin="a").error
        assert "--prompts names the same twice" in error


def test_without_a_chat_template_texts_are_read_as_they_are(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "plain", chat=False)
    (tmp_path / "pairs.jsonl").write_text('{"positive": "the river is old", "negative": "the book"}\n')
    assert run("detect", model, tmp_path / "pairs.jsonl", "-o", tmp_path / "c").status == 0
    assert run("select", tmp_path / "c", "-o", tmp_path / "s", "--top", 2).status == 0
    opened, tokenizer = load_model(str(model))
    ids = tokenizer("the river", return_tensors="pt")["input_ids"]
    output = opened.generate(ids, max_new_tokens=4, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    options = ["--steering", tmp_path / "s", "--compare", "--max-new-tokens", 4, "--json"]
    result = run("generate", model, *options, "--prompt", "the river").json
    assert result["items"][0]["base"] == expected
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    message = run("generate", model, *options, "--prompts", tmp_path / "chat.jsonl").error
    assert "has no chat template" in message


def test_sampling_is_repeatable_from_its_seed(tiny: Path, strong: Path) -> None:
    options = ["--steering", strong, "--prompt", "hi", "--temperature", 1.5, "--max-new-tokens", 12, "--json"]
    first, again, other = (
        run("generate", tiny, *options, "--seed", seed).json["items"][0]["steered"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_other_weights_only_when_said(tmp_path: Path, strong: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    options = ["--steering", strong, "--prompt", "hi", "--max-new-tokens", 2]
    assert "weights" in run("generate", other, *options).error
    assert run("generate", other, *options, "--match", "architecture", "--json").json["items"]


def test_another_architecture_never(tmp_path: Path, strong: Path, dense: Path) -> None:
    other = save_tiny(tmp_path / "other", experts=6)
    for model in (other, dense, "lab:moe"):
        message = run(
            "generate", model, "--steering", strong, "--prompt", "hi", "--match", "architecture"
        ).error
        assert message.startswith("this steering is for olmoe (width 32, 3 layers, 3 routers: 8 experts")


def test_plans_that_cannot_be(tiny: Path, strong: Path, contrast: Path, tmp_path: Path) -> None:
    def refused(*steerings: object) -> str:
        options = [option for steering in steerings for option in ("--steering", steering)]
        return run("generate", tiny, *options, "--prompt", "hi").error

    assert "between -1 and 1" in refused(f"{strong}@2")
    routing = RoutingContrast.from_pretrained(contrast)
    routing.select(activate=1).save_pretrained(tmp_path / "one")
    conflict = refused(tmp_path / "one", f"{tmp_path}/one@-0.5")
    named = f"--steering {tmp_path}/one and --steering {tmp_path}/one@-0.5: layer "
    assert conflict.startswith(named)
    assert conflict.endswith("; --on-conflict sum adds them up")
    both = ("--steering", tmp_path / "one", "--steering", f"{tmp_path}/one@-0.5")
    summed = run("generate", tiny, *both, "--prompt", "x", "--on-conflict", "sum", "--max-new-tokens", 1)
    assert summed.status == 0, summed.stderr
    assert f"--steering {strong}@2: scaled by 2, expert" in refused(f"{strong}@2")
    assert "one edit activates it and another deactivates it" in conflict
    routing.select(activate=4).save_pretrained(tmp_path / "toward")
    routing.select(activate=4, reverse=True).save_pretrained(tmp_path / "away")
    assert "the router chooses 2" in refused(tmp_path / "toward", tmp_path / "away")
    routing.select(top=2, scope="generated").save_pretrained(tmp_path / "generated")
    options = ["--steering", tmp_path / "generated", "--prompt", "hi", "--max-new-tokens", 1]
    assert "generated" in run("generate", tiny, *options).error


def test_prompts_that_cannot_be(tiny: Path, strong: Path, tmp_path: Path) -> None:
    def refused(content: str, name: str = "prompts.jsonl") -> str:
        (tmp_path / name).write_text(content)
        message = run("generate", tiny, "--steering", strong, "--prompts", tmp_path / name).error
        assert message.startswith(str(tmp_path / name))
        return message

    assert "no prompts in it" in refused("\n")
    assert ":2: not JSON" in refused('{"prompt": "a"}\noh')
    assert ":1: the keys are text" in refused('{"text": "a"}')
    assert ":1: the keys are text" in refused('{"text": "a"}', "prompts.txt")
    assert ":1: the keys are prompt, messages" in refused('{"prompt": "a", "messages": []}')
    assert "is empty" in refused('{"prompt": " "}')
    assert "message 1" in refused('{"messages": [{"role": "bot", "content": "a"}]}')
    assert "right is one prompt a line" in refused('{"messages": "a"}')
    assert "the last message is the assistant's" in refused(
        '{"messages": [{"role": "assistant", "content": "a"}]}'
    )
    assert "absent" in run("generate", tiny, "--steering", strong, "--prompts", tmp_path / "absent").error
    assert "refusal, faithfulness" in run("generate", tiny, "--steering", strong, "--prompts", "lab:no").error
    assert "is empty" in run("generate", tiny, "--steering", strong, "--prompt", " ").error
    long = run("generate", tiny, "--steering", strong, "--prompt", "old river " * 2000).error
    assert "context holds 2048" in long


def test_steerings_that_cannot_be_read(tiny: Path, strong: Path, contrast: Path, tmp_path: Path) -> None:
    def refused(path: object) -> str:
        return run("generate", tiny, "--steering", path, "--prompt", "hi").error

    assert "absent" in refused(tmp_path / "absent")
    assert "nobody-has/such-a-plan" in refused("nobody-has/such-a-plan@0.5")
    assert "a steering is needed" in refused(contrast)
    for file in strong.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = tmp_path / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    assert "changed or damaged" in refused(tmp_path)
    tensors.write_bytes(whole[:-8] + b"\x00" * 6 + b"\xf8\x7f")  # the last number becomes NaN
    assert "changed or damaged" in refused(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("strengths", float("nan"), "NaN"),
        ("strengths", 2.0, "between -1 and 1"),
        ("experts", 8, "layer 0 has no expert 8: its experts are 0 to 7"),
        ("layers", 3, "layer 3 does not exist"),
    ],
)
def test_plans_that_were_forged_whole(
    tensor: str, value: float, message: str, tiny: Path, strong: Path, tmp_path: Path
) -> None:
    """With every hash made right again, what a plan says is still checked."""
    tensors = load_file(strong / "tensors.safetensors")
    at = 0 if tensor == "experts" else -1
    tensors[f"edits.0.{tensor}"][at] = value
    save_file(tensors, tmp_path / "tensors.safetensors")
    manifest = json.loads((strong / "manifest.json").read_text())
    if tensor == "layers":
        manifest["edits"][0]["site"]["layers"].append(int(value))
    content = (tmp_path / "tensors.safetensors").read_bytes()
    manifest["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = sha256_of(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    error = run("generate", tiny, "--steering", tmp_path, "--prompt", "hi").error
    assert error.startswith(str(tmp_path))
    assert message in error


def test_the_lab_is_steered(tmp_path: Path) -> None:
    assert run("detect", "lab:moe", "lab:refusal/dev", "-o", tmp_path / "c").status == 0
    assert run("select", tmp_path / "c", "-o", tmp_path / "away", "--top", 12, "--reverse").status == 0
    rows = [{"messages": row["messages"]} for row in lab.task("refusal", "dev")[::24]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--steering", tmp_path / "away", "--compare", "--prompts", tmp_path / "prompts.jsonl"]
    items = run("generate", "lab:moe", *options, "--max-new-tokens", 12, "--json").json["items"]
    refused = {key: sum("cannot help" in item[key] for item in items) for key in ("base", "steered")}
    assert refused["steered"] <= refused["base"] - 0.2 * len(items)


@pytest.mark.parametrize("temperature", ["nan", "1e-40", "inf"])
def test_a_temperature_that_cannot_be_sampled_at(tiny: Path, temperature: str) -> None:
    options = ("--steering", tiny, "--prompt", "a", "--temperature", temperature)
    assert "--temperature is" in run("generate", tiny, *options).error


def test_a_key_given_twice_in_a_file_of_prompts(tiny: Path, strong: Path, tmp_path: Path) -> None:
    for suffix in ("txt", "jsonl"):
        prompts = tmp_path / f"prompts.{suffix}"
        prompts.write_text('{"prompt": "who?", "prompt": "what?"}\n')
        error = run("generate", tiny, "--steering", strong, "--prompts", prompts).error
        assert f"{prompts}:1: not JSON" in error
        assert 'the key "prompt" twice' in error
