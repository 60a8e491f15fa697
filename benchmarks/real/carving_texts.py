"""Texts of real language that a dense chat model is carved on (docs/lab.md).

    python benchmarks/real/carving_texts.py DATA MODEL OUT

DATA is a folder with public files in their published form: wikitext2_valid.txt (Merity et al., CC BY-SA
3.0), tinystories_1000.json (Eldan and Li, CDLA-Sharing 1.0), xquad.en.json (Artetxe et al., CC BY-SA
4.0), and emotions/ with a JSON list of scenarios each (Zou et al., MIT). OUT gets wiki, stories, qa,
emotions and chats as JSON lines; chats are MODEL's own greedy answers to prompts of ours. Each is in an
order in which its last fifth is other articles, stories, scenarios or topics than the rest.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from steersman import load_model

Line = dict[str, Any]

PROMPTS = (
    "Explain to a child how {} works.",
    "Give me five tips about {}.",
    "Write a short poem about {}.",
    "What should I know before I buy something for {}?",
    "Write a letter to a friend about {}.",
    "Summarise the history of {} in a few sentences.",
)
TOPICS = (
    "a bicycle",
    "the sea",
    "healthy breakfast",
    "gardening",
    "Paris",
    "the moon",
    "chess",
    "a birthday party",
)


def wiki(data: Path) -> Iterator[Line]:
    """Paragraphs of articles, with their spacing undone."""
    text = (data / "wikitext2_valid.txt").read_text(encoding="utf-8")
    for joined, sign in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "it")):
        text = text.replace(joined, sign)
    for line in re.sub(r" (?=[,.;:!?)])|(?<=\() ", "", text).split("\n"):
        if len(line.strip()) > 40:
            yield {"text": f"{line.strip()}\n"}


def stories(data: Path) -> Iterator[Line]:
    """Children's stories."""
    for story in json.loads((data / "tinystories_1000.json").read_text(encoding="utf-8")):
        yield {"text": f"{story.strip()}\n\n"}


def qa(data: Path) -> Iterator[Line]:
    """A paragraph and a question about it as a chat, answered in its words."""
    draw = random.Random(2)
    for article in json.loads((data / "xquad.en.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            asked = draw.choice(paragraph["qas"])
            question = f"Document: {paragraph['context']}\nQuestion: {asked['question']}"
            answer = asked["answers"][0]["text"]
            yield {"messages": [_message("user", question), _message("assistant", answer)]}


def emotions(data: Path) -> Iterator[Line]:
    """Scenarios, one sentence each, of all emotions in one order."""
    files = sorted((data / "emotions").glob("*.json"))
    said = [line for file in files for line in json.loads(file.read_text(encoding="utf-8"))]
    random.Random(0).shuffle(said)
    for line in said:
        yield {"text": f"{line}\n"}


def chats(model_name: str) -> Iterator[Line]:
    """The model's own greedy answers."""
    model, tokenizer = load_model(model_name)
    tokenizer.padding_side = "left"
    for topic in TOPICS:
        prompts = [prompt.format(topic) for prompt in PROMPTS]
        asked = tokenizer.apply_chat_template(
            [[_message("user", prompt)] for prompt in prompts],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        )
        with torch.no_grad():
            written = model.generate(**asked, max_new_tokens=64, do_sample=False, repetition_penalty=1.1)
        answers = tokenizer.batch_decode(written[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer.strip():
                yield {"messages": [_message("user", prompt), _message("assistant", answer)]}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    """Write every file."""
    data, model, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    made = {"wiki": wiki(data), "stories": stories(data), "qa": qa(data), "emotions": emotions(data)}
    for name, lines in {**made, "chats": chats(model)}.items():
        (out / f"{name}.jsonl").write_text(
            "".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
