"""What each token is to its row, told without a model: masks, caches, prompt lengths, ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steersman import SteeringNotApplied
from steersman.models.packing import refuse_packed
from steersman.models.tokens import GENERATED, LAST, OUTSIDE, PROMPT, Generation, codes_of, tokens_of_forward

P, L, G, O = PROMPT, LAST, GENERATED, OUTSIDE  # noqa: E741


def roles(mask: Tensor | None, rows: int, columns: int, cached: int = 0, lengths: list[int] | None = None):
    tokens = tokens_of_forward(
        rows, columns, mask=mask, cached=cached, prompt_lengths=lengths, device=torch.device("cpu")
    )
    assert tokens.fresh == 0
    return tokens.roles.tolist()


def test_scopes_hold_the_roles_of_the_design() -> None:
    assert set(codes_of("all")) == {P, L, G}
    assert set(codes_of("prompt")) == {P, L}
    assert set(codes_of("generated")) == {G}
    assert set(codes_of("answer")) == {L, G}


def test_a_forward_is_all_prompt() -> None:
    assert roles(None, 2, 3) == [[P, P, L], [P, P, L]]
    assert roles(torch.tensor([[0, 1, 1], [1, 1, 1]]), 2, 3) == [[O, P, L], [P, P, L]]
    assert roles(torch.tensor([[1, 1, 0], [1, 1, 1]]), 2, 3) == [[P, L, O], [P, P, L]]
    assert roles(torch.tensor([[1, 1, 0]]).bool(), 1, 3) == [[P, L, O]]
    assert roles(torch.tensor([[1.0, 1.0, 0.0]]), 1, 3) == [[P, L, O]]


def test_a_row_of_padding_alone_is_outside() -> None:
    assert roles(torch.tensor([[0, 0], [1, 1]]), 2, 2) == [[O, O], [P, L]]


def test_prompt_lengths_count_real_tokens() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert roles(mask, 2, 5, lengths=[2, 4]) == [[O, P, L, G, G], [P, P, P, L, G]]
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert roles(right, 2, 5, lengths=[2, 1]) == [[P, L, G, O, O], [L, G, G, G, G]]


def test_prompt_lengths_with_a_cache() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert roles(mask, 2, 2, cached=3, lengths=[2, 3]) == [[L, G], [G, G]]
    assert roles(None, 2, 2, cached=3, lengths=[4, 5]) == [[L, G], [P, L]]
    assert roles(torch.ones(1, 2), 1, 2, cached=3, lengths=[4]) == [[L, G]]


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_four_dimensional_masks(kind: str) -> None:
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    full = (causal & real[:, None, :])[:, None]
    full = full if kind == "bool" else torch.where(full, 0.0, torch.finfo(torch.float32).min)
    assert roles(full, 2, 5) == [[O, O, P, P, L], [P, P, P, P, L]]
    assert roles(full, 2, 5, lengths=[2, 4]) == [[O, O, P, L, G], [P, P, P, L, G]]
    # The last two columns after three cached ones: real tokens before them are counted, padding is not.
    assert roles(full[:, :, 3:], 2, 2, cached=3, lengths=[2, 4]) == [[L, G], [L, G]]
    # A static cache has more keys than were ever filled.
    spare = torch.zeros(2, 1, 5, 3) if kind == "additive" else torch.zeros(2, 1, 5, 3, dtype=torch.bool)
    spare = spare + torch.finfo(torch.float32).min if kind == "additive" else spare
    longer = torch.cat([full, spare], dim=-1)
    assert roles(longer, 2, 5) == [[O, O, P, P, L], [P, P, P, P, L]]
    assert roles(longer[:, :, 3:], 2, 2, cached=3, lengths=[2, 4]) == [[L, G], [L, G]]


def test_what_cannot_be_told_is_refused() -> None:
    with pytest.raises(SteeringNotApplied, match="prompt_lengths has 1 entry for 2 rows"):
        roles(None, 2, 3, lengths=[1])
    with pytest.raises(SteeringNotApplied, match=r"shape \(2, 7\)"):
        roles(torch.ones(2, 7), 2, 3)
    with pytest.raises(SteeringNotApplied, match="mask of shape"):
        roles(torch.ones(2, 1, 5, 5), 2, 3)


def following(prompt: list[list[int]], cached: int = 0) -> Generation:
    return Generation(torch.tensor(prompt).bool(), cached)


def test_a_generation_with_a_cache() -> None:
    generation = following([[0, 1, 1], [1, 1, 1]])
    first = generation.next(2, 3, has_cache=True, cache_length=0)
    assert first.roles.tolist() == [[O, P, L], [P, P, L]]
    assert generation.next(2, 1, has_cache=True, cache_length=3).roles.tolist() == [[G], [G]]
    generation.end_rows(torch.tensor([True, False]))
    assert generation.next(2, 1, has_cache=True, cache_length=4).roles.tolist() == [[O], [G]]
    generation.end_rows(torch.tensor([False, False]))  # an end is for good
    assert generation.next(2, 1, has_cache=True, cache_length=5).roles.tolist() == [[O], [G]]


def test_a_generation_without_a_cache_counts_only_what_is_new() -> None:
    generation = following([[1, 1, 1]])
    assert generation.next(1, 3, has_cache=False, cache_length=None).fresh == 0
    second = generation.next(1, 4, has_cache=False, cache_length=None)
    assert (second.roles.tolist(), second.fresh) == ([[P, P, L, G]], 3)
    generation.end_rows(torch.tensor([True]))
    third = generation.next(1, 5, has_cache=False, cache_length=None)
    assert (third.roles.tolist(), third.fresh) == ([[P, P, L, G, O]], 4)


def test_without_a_cache_a_forward_must_hold_everything_fed_before() -> None:
    """From `inputs_embeds` without a cache transformers feeds only the new token: its place is unknown."""
    generation = following([[1, 1, 1]])
    generation.next(1, 3, has_cache=False, cache_length=None)
    with pytest.raises(SteeringNotApplied, match="roles cannot be told"):
        generation.next(1, 1, has_cache=False, cache_length=None)


def test_a_prefill_in_chunks() -> None:
    generation = following([[0, 0, 1, 1, 1]])
    seen = [
        generation.next(1, columns, has_cache=True, cache_length=start).roles.tolist()[0]
        for start, columns in ((0, 2), (2, 2), (4, 1), (5, 1))
    ]
    assert seen == [[O, O], [P, P], [L], [G]]


def test_rows_are_multiplied_by_beams() -> None:
    generation = following([[0, 1], [1, 1]])
    first = generation.next(6, 2, has_cache=True, cache_length=0)
    assert first.roles.tolist() == [[O, L]] * 3 + [[P, L]] * 3
    assert generation.next(6, 1, has_cache=True, cache_length=2).roles.tolist() == [[G]] * 6


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SteeringNotApplied, match="given 2 rows but fed 3"):
        following([[1], [1]]).next(3, 1, has_cache=True, cache_length=0)
    generation = following([[1], [1]])
    generation.next(2, 1, has_cache=True, cache_length=0)
    with pytest.raises(SteeringNotApplied, match="holds 7 tokens"):
        generation.next(2, 1, has_cache=True, cache_length=7)


def test_a_cache_passed_in_holds_what_came_before_the_prompt() -> None:
    generation = following([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], cached=3)
    assert generation.next(2, 2, has_cache=True, cache_length=3).roles.tolist() == [[P, L], [P, L]]
    assert generation.next(2, 1, has_cache=True, cache_length=5).roles.tolist() == [[G], [G]]


# Several texts in a row -------------------------------------------------------------------------------------


def packed(
    mask: Tensor | None = None, rows: int = 1, columns: int = 6, cached: int = 0, **kwargs: object
) -> bool:
    try:
        refuse_packed(kwargs, rows, columns, mask, cached)
    except SteeringNotApplied:
        return True
    return False


def test_position_ids_that_start_again() -> None:
    assert not packed()
    assert not packed(position_ids=torch.arange(6)[None])
    assert not packed(position_ids=torch.arange(6))
    assert not packed(position_ids=torch.arange(2, 8)[None])
    assert not packed(rows=3, position_ids=torch.arange(6)[None])
    assert packed(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert packed(position_ids=torch.tensor([0, 1, 2, 0, 1, 2]))
    assert packed(position_ids=torch.tensor([[0, 0, 1, 2, 3, 4]]))
    assert packed(rows=2, position_ids=torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1]]))
    assert packed(position_ids=torch.tensor([[0, 1, 2, 7, 8, 9]])), "another text to transformers itself"


@pytest.mark.parametrize("pad", [0, 1])
def test_positions_of_padding_say_nothing(pad: int) -> None:
    left, right = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0, 0]])
    assert not packed(left, position_ids=torch.tensor([[pad] * 3 + [0, 1, 2]]))
    assert not packed(right, position_ids=torch.tensor([[0, 1, 2] + [pad] * 3]))
    assert packed(left, position_ids=torch.tensor([[pad] * 3 + [0, 1, 0]]))
    assert packed(torch.tensor([[1, 1, 0, 1, 1, 1]]), position_ids=torch.tensor([[0, 1, pad, 0, 1, 2]]))
    assert not packed(torch.tensor([[1, 1, 0, 1, 1, 1]]), position_ids=torch.tensor([[0, 1, pad, 3, 4, 5]]))


def test_positions_that_go_on_from_a_cache() -> None:
    assert not packed(columns=2, cached=4, position_ids=torch.tensor([[4, 5]]))
    assert not packed(columns=1, cached=4, position_ids=torch.tensor([[4]]))
    assert packed(columns=2, cached=4, position_ids=torch.tensor([[0, 1]]))
    mask = torch.tensor([[0, 0, 0, 0, 1, 1]])
    assert not packed(mask, columns=2, cached=4, position_ids=torch.tensor([[0, 1]]))


def test_positions_with_several_axes() -> None:
    """Two tokens, an image of 1 × 2 × 2, text from the largest position on."""
    time = torch.tensor([0, 1, 2, 2, 2, 2, 4, 5])
    row, column = torch.tensor([0, 1, 2, 2, 3, 3, 4, 5]), torch.tensor([0, 1, 2, 3, 2, 3, 4, 5])
    image = torch.stack([time, row, column])[:, None]
    assert not packed(columns=8, position_ids=image)
    assert not packed(columns=8, position_ids=torch.cat([torch.arange(8).expand(1, 1, -1), image]))
    again = torch.cat([image[:, :, :4], image[:, :, :4]], dim=2)
    assert packed(columns=8, position_ids=again)
    assert packed(columns=8, position_ids=torch.zeros(3, 1, 8, dtype=torch.int64))


def test_what_kernels_are_told_of_packed_texts() -> None:
    assert not packed(cu_seq_lens_q=torch.tensor([0, 6]), cu_seq_lens_k=torch.tensor([0, 6]))
    assert not packed(rows=2, columns=3, cu_seqlens=torch.tensor([0, 3, 6]))
    assert packed(cu_seq_lens_q=torch.tensor([0, 2, 6]))
    assert packed(cu_seqlens=torch.tensor([0, 2, 4, 6]))
    assert not packed(seq_idx=torch.zeros(1, 6, dtype=torch.int32))
    assert packed(seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    assert not packed(torch.tensor([[0, 0, 1, 1, 1, 1]]), seq_idx=torch.tensor([[-1, -1, 0, 0, 0, 0]]))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_in_blocks(kind: str) -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    text = torch.tensor([0, 0, 1, 1, 1, 1])
    blocks, window = causal & (text[:, None] == text), causal & ~causal.tril(-3)
    padding = causal & (torch.arange(6) >= 2)
    for visible, expected in ((causal, False), (blocks, True), (window, False), (padding, False)):
        mask = visible[None, None]
        if kind == "additive":
            mask = torch.zeros(1, 1, 6, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
        assert packed(mask) is expected
        assert packed(torch.nn.functional.pad(mask, (0, 4), value=kind == "additive" and -1e9)) is expected
        assert packed(mask[:, :, 1:], columns=5, cached=1) is expected
