"""What answers prompts for `generate`: a model in this process, in batches, or an engine, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from steersman.errors import ModelError, PairsError, SteersmanError
from steersman.rendering import render

if TYPE_CHECKING:
    from steersman.models.decoding import OwnSettings
    from steersman.pairs import Content
    from steersman.steering import Steering
    from steersman.vllm.backend import Engine

Match = Literal["weights", "architecture"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, a text or messages, and where."""

    content: Content
    where: str


class Writer:
    """A model and its tokenizer, ready to answer prompts in batches."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        # New tokens must follow the prompt at once, so padding goes to the left; masked, any token pads.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    @property
    def own_settings(self) -> OwnSettings:
        """What the checkpoint's own generation settings do to the answers."""
        from steersman.models.decoding import own_settings

        return own_settings(self.model, sampled=self.temperature > 0)

    def ids_of(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens. Raises PairsError where prompt and answer exceed the model's context."""
        content = prompt.content
        if isinstance(content, str) and self.tokenizer.chat_template:
            content = [{"role": "user", "content": content}]
        try:
            text, add_special_tokens = render(self.tokenizer, content)
        except PairsError as error:
            raise PairsError(f"{prompt.where}: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)[
            "input_ids"
        ]
        if not ids:
            raise PairsError(f"{prompt.where}: the prompt has no tokens")
        from steersman.models.architecture import check_ids

        check_ids(self.model, max(ids), prompt.where)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(ids) + self.max_new_tokens > context:
            raise PairsError(
                f"{prompt.where}: {len(ids)} tokens and {self.max_new_tokens} new ones, but the model's "
                f"context holds {context}; shorten the prompt, or lower --max-new-tokens"
            )
        return ids

    def answer(
        self,
        batch: Sequence[tuple[Prompt, list[int]]],
        steering: Steering,
        *,
        match: Match,
        compare: bool,
        seed: int,
    ) -> list[dict[str, Any]]:
        """An item a prompt: the prompt, the model's own answer if asked for, the steered one, the receipt.

        The receipt is the batch's, and says how many prompts it covers.
        """
        ids = [row for _, row in batch]
        base = self._write(ids, seed) if compare else []
        with steering.apply(self.model, match=match, receipt="changes") as receipt:
            steered = self._write(ids, seed)
        return [
            {
                "prompt": prompt.content,
                **({"base": base[row]} if compare else {}),
                "steered": steered[row],
                "receipt": {**receipt.to_json(), "prompts": len(batch)},
            }
            for row, (prompt, _) in enumerate(batch)
        ]

    def _write(self, ids: Sequence[list[int]], seed: int) -> list[str]:
        import torch

        from steersman.models.decoding import decoding

        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        torch.manual_seed(seed)
        with torch.inference_mode():
            try:
                written = self.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    tokenizer=self.tokenizer,  # for stop strings that a checkpoint may ask for
                    **decoding(self.model, temperature=self.temperature),
                )
            except (ValueError, TypeError, IndexError, AssertionError) as error:
                # What a checkpoint's own generation_config.json asks for can fail in many ways.
                if isinstance(error, SteersmanError):
                    raise
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise ModelError(f"the model cannot generate with its own settings ({reason[0]})") from error
        new = written[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new, skip_special_tokens=True))


class EngineWriter(Writer):
    """The same with an engine: all prompts are answered at once, the base's answers among them."""

    def __init__(self, engine: Engine, max_new_tokens: int, temperature: float) -> None:
        super().__init__(engine.model, engine.tokenizer, max_new_tokens, temperature)
        self._engine = engine

    def answer(
        self,
        batch: Sequence[tuple[Prompt, list[int]]],
        steering: Steering,
        *,
        match: Match,
        compare: bool,
        seed: int,
    ) -> list[dict[str, Any]]:
        """An item a prompt, with a receipt of its own; how many choices changed is not known."""
        from steersman.vllm.writing import write

        ids = [row for _, row in batch]
        steered = [*([None] * len(ids) if compare else []), *[steering] * len(ids)]
        written = write(
            self._engine,
            [*(ids if compare else []), *ids],
            steered,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=None,
            seeds=[seed + row for _ in range(2 if compare else 1) for row in range(len(ids))],
        )
        texts = self.tokenizer.batch_decode([one.ids[0] for one in written], skip_special_tokens=True)
        return [
            {
                "prompt": prompt.content,
                **({"base": texts[row]} if compare else {}),
                "steered": texts[len(texts) - len(ids) + row],
                "receipt": {
                    "fingerprint": steering.fingerprint,
                    "match": match,
                    "tokens": written[len(texts) - len(ids) + row].receipt["tokens"],
                    "changed": None,
                    "prompts": 1,
                },
            }
            for row, (prompt, _) in enumerate(batch)
        ]
