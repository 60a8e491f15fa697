"""What answers prompts for `generate`: a model in this process, in batches, or an engine, all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from steersman.errors import PairsError
from steersman.rendering import render, special_ids
from steersman.showing import count_of

if TYPE_CHECKING:
    from steersman.models.decoding import OwnSettings
    from steersman.pairs import Content
    from steersman.steering import Steering
    from steersman.vllm.backend import Engine

Match = Literal["weights", "architecture"]

Ended = Literal["end", "length", "full", "stopped"]
"""An answer ends by the model's will, by --max-new-tokens, where the context is full, or by Ctrl-C."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as it was given, a text or messages, and where."""

    content: Content
    where: str


@dataclass(frozen=True)
class Streamed:
    """An answer that was shown as it came: its text, the receipt of a steered one, and what ended it."""

    text: str
    receipt: dict[str, Any] | None
    ended: Ended


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

    def ids_of(self, prompt: Prompt, least: int | None = None) -> list[int]:
        """The prompt's tokens. Raises PairsError where the prompt and its new tokens (`least` of them, else
        as many as there may be) exceed the model's context.
        """
        new = self.max_new_tokens if least is None else least
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
        if self._context is not None and len(ids) + new > self._context:
            right = "shorten the prompt, or lower --max-new-tokens"
            raise PairsError(
                f"{prompt.where}: {count_of(len(ids), 'token')} and {count_of(new, 'new one')}, but the "
                f"model's context holds {self._context}; {right if least is None else 'shorten it'}"
            )
        return ids

    @property
    def _context(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def answer(
        self,
        batch: Sequence[tuple[Prompt, list[int]]],
        steering: Steering | None,
        *,
        match: Match,
        compare: bool,
        seed: int,
    ) -> list[dict[str, Any]]:
        """An item a prompt: the prompt, the model's own answer if asked for, the steered one, the receipt;
        without a steering the model's own answer alone.

        The receipt is the batch's, and says how many prompts it covers.
        """
        ids = [row for _, row in batch]
        base = self._write(ids, seed) if compare or steering is None else []
        if steering is None:
            return [
                {"prompt": prompt.content, "base": text}
                for (prompt, _), text in zip(batch, base, strict=True)
            ]
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

    def stream(
        self,
        ids: list[int],
        steering: Steering | None,
        *,
        match: Match,
        seed: int,
        show: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> Streamed:
        """An answer to one prompt, whose text is shown as it comes; it ends early where `stopped` says so, or
        the model's context is full.

        What is shown adds up to the answer's text: words that later tokens could still change are held back.
        """
        import torch

        shown = _Shown(self.tokenizer, show)

        def stop(tokens: Any, scores: Any, **unused: Any) -> Any:
            return torch.full((len(tokens),), stopped(), device=tokens.device)

        room = self.max_new_tokens if self._context is None else self._context - len(ids)
        most = min(self.max_new_tokens, room)
        watch = {"streamer": shown, "stopping_criteria": [stop], "max_new_tokens": most}
        if steering is None:
            (new,) = self._generate([ids], seed, **watch)
            receipt = None
        else:
            with steering.apply(self.model, match=match, receipt="changes") as applied:
                (new,) = self._generate([ids], seed, **watch)
            receipt = {**applied.to_json(), "prompts": 1}
        cut = len(new) >= most and int(new[-1]) not in special_ids(self.tokenizer)
        ended: Ended = "full" if most < self.max_new_tokens else "length"
        return Streamed(shown.text, receipt, "stopped" if stopped() else ended if cut else "end")

    def _write(self, ids: Sequence[list[int]], seed: int) -> list[str]:
        return list(self.tokenizer.batch_decode(self._generate(ids, seed), skip_special_tokens=True))

    def _generate(self, ids: Sequence[list[int]], seed: int, **more: Any) -> Any:
        """The new tokens of each row, int64 [rows, tokens]."""
        import torch

        from steersman.models.decoding import decoding, generating

        inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
        torch.manual_seed(seed)
        with torch.inference_mode(), generating(self.model):
            written = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pad_token_id=self.tokenizer.pad_token_id,
                tokenizer=self.tokenizer,  # for stop strings that a checkpoint may ask for
                **decoding(self.model, temperature=self.temperature),
                **{"max_new_tokens": self.max_new_tokens, **more},
            )
        return written[:, inputs["input_ids"].shape[1] :]


class _Shown:
    """What transformers tells of new tokens as they come, in the thread that generates; shown as text."""

    _HELD = 16
    """Letters at the end that a later token may still change: a word, or a part of one."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] | None = None
        self._so_far = ""

    def put(self, tokens: Any) -> None:
        """The prompt's tokens, and then each new one."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += tokens.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True).rstrip("\ufffd")
        self._advance(text[: max(text.rfind(" "), text.rfind("\n"), len(text) - self._HELD, 0)])

    def end(self) -> None:
        """No more come."""
        self.text = self._tokenizer.decode(self._ids or [], skip_special_tokens=True)
        if not self.text.startswith(self._so_far):  # a tokenizer that takes back what it said: the whole anew
            self._so_far = ""
            self._show("\n")
        self._advance(self.text)

    def _advance(self, text: str) -> None:
        if text.startswith(self._so_far):
            self._show(text[len(self._so_far) :])
            self._so_far = text


class EngineWriter(Writer):
    """The same with an engine: all prompts are answered at once, the base's answers among them."""

    def __init__(self, engine: Engine, max_new_tokens: int, temperature: float) -> None:
        super().__init__(engine.model, engine.tokenizer, max_new_tokens, temperature)
        self._engine = engine

    def answer(
        self,
        batch: Sequence[tuple[Prompt, list[int]]],
        steering: Steering | None,
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
        if steering is None:
            return [
                {"prompt": prompt.content, "base": text}
                for (prompt, _), text in zip(batch, texts, strict=True)
            ]
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
