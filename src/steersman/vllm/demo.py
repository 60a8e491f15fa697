"""Serving, shown: a model of the lab behind the OpenAI client, asked with and without its steering.

`python -m steersman.vllm.demo`. Every answer is compared with what transformers says under the same plan;
what is not as claimed ends the demo with exit status 1.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steersman.errors import SteersmanError

MODEL = "lab:target"
NAME, ALIAS = "refusing", "target-safe"
PAIRS = 200
STRENGTH = 0.4
"""Twice what turns the first of four answers."""
TOKENS = 14
REFUSAL = "i cannot help with that ."
ENGINE = (
    *("--enforce-eager", "--distributed-executor-backend", "uni"),
    *("--max-model-len", "128", "--max-num-seqs", "16", "--max-num-batched-tokens", "256"),
)
ASKED = (None, NAME, f"{NAME}@0.5")
"""What each prompt is asked with."""


@dataclass(frozen=True)
class Answer:
    """A text, and the receipt that came with it."""

    text: str
    receipt: dict[str, Any]


class Claims:
    """What the demo says, and whether it is so."""

    def __init__(self) -> None:
        self.wrong = 0

    def __call__(self, claim: str, holds: bool) -> None:
        """Print a claim, and remember one that does not hold."""
        self.wrong += not holds
        print(f"  {'yes' if holds else 'NO '}  {claim}", flush=True)


def main() -> int:
    """Run it. Returns the exit status."""
    try:
        import openai  # noqa: F401
    except ModuleNotFoundError:
        print(
            "steersman: error: the demo asks with the client of OpenAI: pip install openai", file=sys.stderr
        )
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="steersman-") as folder:
            return _run(Path(folder))
    except SteersmanError as error:
        print(f"steersman: error: {error}", file=sys.stderr)
        return 2


def _run(folder: Path) -> int:
    import openai

    import steersman
    from steersman.vllm.server.process import ServerProcess, free_port

    print(f"{MODEL} answers what it should not. A plan is made of {PAIRS} pairs …", flush=True)
    model, tokenizer = steersman.load_model(MODEL)
    concept = steersman.refine_concept(model, tokenizer, _pairs())
    plan = concept.steering(STRENGTH)
    plan.save_pretrained(folder / NAME)
    prompts = _prompts()
    expected = {
        asked: [_by_transformers(model, tokenizer, plan, asked, prompt) for prompt in prompts]
        for asked in ASKED
    }
    print("The engine starts …", flush=True)
    arguments = (
        MODEL,
        "--steering",
        f"{NAME}={folder / NAME}",
        "--alias",
        f"{ALIAS}={NAME}",
        "--port",
        str(free_port()),
    )
    with ServerProcess.start(*arguments, "--", *ENGINE, environment=_environment()) as server:
        print(f"It answers at {server.address}.\n", flush=True)
        client = openai.OpenAI(base_url=server.address, api_key="none", max_retries=0)
        return _shown(client, prompts, expected, plan.fingerprint)


def _shown(
    client: Any, prompts: Sequence[str], expected: dict[str | None, list[str]], fingerprint: str
) -> int:
    alone = {asked: [_ask(client, prompt, asked) for prompt in prompts] for asked in ASKED}
    for number, prompt in enumerate(prompts):
        print(prompt)
        for asked in ASKED:
            answer = alone[asked][number]
            tokens = ", ".join(f"{site}: {count}" for site, count in answer.receipt["tokens"].items())
            print(f"    {asked or 'as it is':<14} {answer.text:<44} {tokens or '-'}")
    print()
    claims = Claims()
    claims(
        "every answer is that of transformers under the same plan",
        all([answer.text for answer in alone[asked]] == expected[asked] for asked in ASKED),
    )
    claims("the model as it is answers", not any(answer.text == REFUSAL for answer in alone[None]))
    claims("steered it refuses", all(answer.text == REFUSAL for answer in alone[NAME]))
    claims(
        "receipts name the plan, and nothing where none was asked for",
        {answer.receipt["fingerprint"] for answer in alone[NAME]} == {fingerprint}
        and {answer.receipt["fingerprint"] for answer in alone[None]} == {None},
    )
    mixed = [(asked, number) for number in range(len(prompts)) for asked in ASKED] * 4
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda one: _ask(client, prompts[one[1]], one[0]), mixed))
    claims(
        f"{len(mixed)} requests at once, steered and not, are each answered as alone",
        together == [alone[asked][number] for asked, number in mixed],
    )
    claims(f"the alias {ALIAS} is steered", _ask(client, prompts[0], None, ALIAS) == alone[NAME][0])
    claims("a stream ends with the receipt", _streamed(client, prompts[0]) == alone[NAME][0])
    claims('an unknown name is refused, not ignored: "refuzing"', _refused(client, prompts[0], "refuzing"))
    return 1 if claims.wrong else 0


def _environment() -> dict[str, str]:
    """What keeps the engine small and its start short."""
    import torch

    wanted = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():  # nothing that a fork would break: what is imported stays so
        wanted["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _pairs() -> Any:
    from steersman import load_pairs

    return load_pairs("lab:restricted/train")[:PAIRS]


def _prompts() -> list[str]:
    from steersman.lab.datasets import task

    return [str(row["messages"][-1]["content"]) for row in task("restricted")[:4]]


def _by_transformers(model: Any, tokenizer: Any, plan: Any, asked: str | None, prompt: str) -> str:
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    strength = float((asked or "").partition("@")[2] or 1)
    with nullcontext() if asked is None else (plan * strength).apply(model):
        made = model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
    text: str = tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def _ask(client: Any, prompt: str, asked: str | None, model: str = MODEL) -> Answer:
    extra = {} if asked is None else {"vllm_xargs": {"steering": asked}}
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=TOKENS,
        temperature=0,
        extra_body=extra,
    )
    return Answer((answer.choices[0].message.content or "").strip(), answer.steersman)


def _streamed(client: Any, prompt: str) -> Answer:
    chunks = list(
        client.chat.completions.create(
            model=ALIAS,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return Answer(text.strip(), getattr(chunks[-1], "steersman", {}))


def _refused(client: Any, prompt: str, asked: str) -> bool:
    import openai

    try:
        _ask(client, prompt, asked)
    except openai.BadRequestError as error:
        print(f"       {error.message}")
        return True
    return False


if __name__ == "__main__":
    raise SystemExit(main())
