"""What is counted of contrast pairs: each side's token ids, and the positions of the tokens to count."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from steersman.experts.tally import Counted
from steersman.models.encoding import EncodeSide, longest_text
from steersman.pairs import Content
from steersman.rendering import Part, encode, encode_prompt, special_ids


def counted_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    counted: Counted,
    new_tokens: int = 0,
    *,
    longest: int | None = None,
) -> EncodeSide:
    """How a side is encoded for counting.

    Args:
        model: What will read it: its context is the limit.
        tokenizer: Its tokenizer.
        counted: Which tokens; `generated` takes prompts alone, without positions.
        new_tokens: How many the model may write after a prompt.
        longest: Tokens that are read at most, if that is fewer than the context.
    """
    limits = [limit for limit in (longest_text(model), longest) if limit is not None]
    most = min(limits) - new_tokens if limits else None
    special = frozenset(special_ids(tokenizer))

    def prompt(content: Content, target: str | None, where: str) -> tuple[Sequence[int], Sequence[int]]:
        return encode_prompt(tokenizer, content, where=where, max_length=most), ()

    def text(content: Content, target: str | None, where: str) -> tuple[Sequence[int], Sequence[int]]:
        encoded = encode(tokenizer, content, target, where=where, max_length=most, part=part, special=special)
        return encoded.ids, encoded.target

    if counted == "generated":
        return prompt
    part: Part = counted
    return text
