"""An evaluation of 400 items under five arms, against the bare generate calls that it needs.

The rival renders, pads by length and generates, steered where the arm is, and throws the answers away.
"""

from __future__ import annotations

from typing import Any

import torch
from measuring import interleaved, options, ratio, report

import steersman
from steersman.evaluation.tasks import load_task

ITEMS, BATCH, NEW_TOKENS = 400, 100, 12
INSTRUCTION = "trust the document ."
MOST = 1.15


def main() -> None:
    chosen = options(__doc__ or "")
    model, tokenizer = steersman.load_model("lab:moe")
    contrast = steersman.detect_experts(model, tokenizer, steersman.load_pairs("lab:faithfulness/dev"))
    toward, back = contrast.select(top=16), contrast.select(top=16, reverse=True)
    task = load_task("lab:faithfulness/test", limit=ITEMS)

    def evaluated() -> None:
        steersman.evaluate(
            model,
            tokenizer,
            {"faithful": toward},
            task=task,
            reverse={"faithful": back},
            instruction=INSTRUCTION,
            random=0,
            batch_size=BATCH,
            max_new_tokens=NEW_TOKENS,
        )

    def generated() -> None:
        for plan, system in (
            (None, None),
            (toward, None),
            (back, None),
            (None, INSTRUCTION),
            (toward, INSTRUCTION),
        ):
            prompts = sorted((prompt_of(item.content, system) for item in task), key=len)
            for start in range(0, len(prompts), BATCH):
                answer(prompts[start : start + BATCH], plan)

    def prompt_of(content: Any, system: str | None) -> list[int]:
        messages = [*([{"role": "system", "content": system}] if system else []), *content]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(prompts: list[list[int]], plan: steersman.Steering | None) -> None:
        given = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": tokenizer.pad_token_id}
        with torch.inference_mode():
            if plan is None:
                produced = model.generate(**given, **settings)
            else:
                with plan.apply(model):
                    produced = model.generate(**given, **settings)
        tokenizer.batch_decode(produced)

    times = interleaved(
        {"evaluate": evaluated, "generate": generated, "generate again": generated},
        chosen.rounds or 4,
        warm=1,
    )
    report(
        f"{ITEMS} items × 5 arms on lab:moe, batches of {BATCH}, {NEW_TOKENS} new tokens",
        [
            ratio("evaluate / bare generate calls", times["evaluate"], times["generate"], bound=MOST),
            ratio("bare generate calls / themselves (noise)", times["generate again"], times["generate"]),
        ],
        notes="With judging, statistics and the shown items' tokens against the base; without random plans.",
        name="evaluation",
        save=chosen.save,
    )


if __name__ == "__main__":
    main()
