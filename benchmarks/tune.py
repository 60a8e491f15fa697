"""What tuning's grid costs: 12 layers × 6 doses on 32 items as rows of one batch, against separate calls.

The rival is what one would do by hand: for each candidate a plan, applied while the model generates for all
items in one batch, once to read the log-odds of the first token off (the least that can be asked), once to
answer in 32 tokens. Both must find the same log-odds. `--model FOLDER` takes a checkpoint of one's own.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from measuring import interleaved, ratio, report

from steersman import Steering, load_model, load_task
from steersman.evaluation.prompts import encode_fork
from steersman.evaluation.screening.texts import preferences
from steersman.models.architecture import decoder_layers
from steersman.models.plan_rows import PlanRows
from steersman.models.reading import pad_id

LAYERS, SIZES, ITEMS, ANSWER, ROUNDS = 12, (0.1, 0.2, 0.3, 0.4, 0.6, 0.8), 32, 32, 3


class Bench:
    """One model, its candidates and items; what each way found is kept."""

    def __init__(self, name: str) -> None:
        self.model, self.tokenizer = load_model(name)
        task = load_task("lab:refusal/train")
        forks = [(item, encode_fork(self.tokenizer, item)) for item in task]
        task = type(task)(
            task.name,
            [item for item, fork in forks if len(fork.ids) == fork.prompt_length][:ITEMS],
            task.behaviour,
        )
        self.reading = preferences(task, self.tokenizer)
        count = len(decoder_layers(self.model))
        self.layers = sorted({*np.linspace(0, count - 1, min(LAYERS, count)).round().astype(int).tolist()})
        draw = torch.Generator().manual_seed(0)
        width = self.model.config.get_text_config().hidden_size
        direction = torch.randn(width, generator=draw)
        direction /= direction.norm()
        self.plans = [
            Steering.from_vectors(self.model, {layer: direction}, strength=size * width**0.5, scope="answer")
            for layer in self.layers
            for size in SIZES
        ]
        longest = max(len(text.ids) for text in self.reading.texts)
        pad = pad_id(self.tokenizer)
        texts = self.reading.texts
        self.ids = torch.tensor([[pad] * (longest - len(t.ids)) + [*t.ids] for t in texts])
        self.mask = torch.tensor([[0] * (longest - len(t.ids)) + [1] * len(t.ids) for t in texts])
        self.found: dict[str, Any] = {}

    def rows(self) -> None:
        """All candidates by tuning, its own checks and unsteered forwards included."""
        reader = PlanRows(self.model, self.tokenizer)
        self.found["rows"] = reader.scores(self.reading.texts, [None, *self.plans])[1:]
        self.found["short"] = all(reader.ways.values())

    def generated(self, tokens: int) -> None:
        """Each candidate by a call of its own."""
        found = []
        for plan in self.plans:
            with plan.apply(self.model):
                output = self.model.generate(
                    input_ids=self.ids,
                    attention_mask=self.mask,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=pad_id(self.tokenizer),
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            first = output.logits[0].double()
            found.append([self._d(first[row], text) for row, text in enumerate(self.reading.texts)])
        self.found["generate"] = np.array(found)

    @staticmethod
    def _d(logits: torch.Tensor, text: Any) -> float:
        return sum(weight * float(logits[token]) for _, token, weight in text.scored)


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="lab:target", help="a checkpoint of 12 layers or more")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no-answers", action="store_true", help="leave out the calls of 32 tokens")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.model)
    arms = {"rows": bench.rows, "first token": lambda: bench.generated(1)}
    if not given.no_answers:
        arms["answers"] = lambda: bench.generated(ANSWER)
    times = interleaved(arms, given.rounds, warm=0)
    furthest = float(np.abs(bench.found["rows"] - bench.found["generate"]).max())
    if furthest > 1e-3:
        raise SystemExit(f"rows differ from separate calls by {furthest:.1e} nats")
    bound = 8 if len(bench.layers) == LAYERS else None
    lines = [ratio("generate of one token / rows", times["first token"], times["rows"], bound=bound)]
    if not given.no_answers:
        lines.append(ratio(f"generate of {ANSWER} tokens / rows", times["answers"], times["rows"]))
    candidates = f"{len(bench.layers)} layers × {len(SIZES)} doses, {ITEMS} items"
    report(
        f"Tuning's grid, {candidates}, {len(bench.ids[0])} tokens at most ({bench.model.config.model_type})",
        lines,
        notes=f"CPU thread time, one thread; rows: {min(times['rows']):.1f} s at least. The short way was "
        f"{'' if bench.found['short'] else 'not '}taken; log-odds differ by {furthest:.1e} nats at most.",
        name="tune",
        save=given.save,
    )


if __name__ == "__main__":
    main()
