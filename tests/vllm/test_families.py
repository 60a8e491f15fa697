"""Every family answers in the engine as it does in transformers, steered and not, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine import (
    FAMILIES,
    answer_of,
    ask,
    closing,
    open_engine,
    params,
    plans_for,
    prompts,
    reference,
    save_plans,
    save_tiny,
)

LONG = pytest.mark.long
COMPILED = [pytest.param(name, marks=[LONG] if name != "olmoe" else []) for name in FAMILIES]


def check(name: str, folder: Path, **options: object) -> None:
    model = save_tiny(name, folder / "model")
    plans = plans_for(model, name)
    first, *_, last = plans
    composed = {f"{first},{last}@0.5": plans[first] + 0.5 * plans[last]}
    asked = {None: None, **plans, **composed}
    given = prompts(2)
    steerings = {"steerings": save_plans(plans, folder / "plans")}
    with closing(open_engine(folder / "model", name, steerings, **options)) as engine:
        wanted = [(plan, prompt) for plan in [*asked, None] for prompt in given]
        outputs = ask(engine, [prompt for _, prompt in wanted], [params(plan) for plan, _ in wanted])
    for (plan, prompt), output in zip(wanted, outputs, strict=True):
        expected, seen = reference(model, asked[plan], prompt), answer_of(output)
        assert seen.tokens == expected.tokens, (plan, prompt)
        torch.testing.assert_close(seen.log_probabilities, expected.log_probabilities, atol=1e-4, rtol=0)
        if plan is not None:
            with asked[plan].apply(model) as receipt:
                model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
            assert output.steersman["fingerprint"] == receipt.fingerprint
            assert output.steersman["tokens"] == receipt.tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize("name", COMPILED)
def test_equals_transformers_compiled(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, enforce_eager=False)
