"""Counting one batch of texts: a padded forward of the decoder, and what its routers chose for the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from steersman.errors import ModelError
from steersman.experts.moments import Integers
from steersman.experts.recording import recording
from steersman.models.architecture import RouterSite
from steersman.models.decoding import decoding, generating, text_ends
from steersman.models.reading import input_device, padded, read_batch

Ints = np.ndarray[Any, Any]


def count_batch(
    model: nn.Module,
    sites: Sequence[RouterSite],
    ids: Sequence[Ints],
    targets: Sequence[Ints],
    strata: Sequence[Ints] | None = None,
    number: int = 1,
) -> Integers:
    """Run texts through the decoder in one padded batch and count the experts of their target tokens.

    Args:
        ids: Token ids of each text.
        targets: Positions of the target tokens of each text.
        strata: The stratum of each target token of each text; None where there is one.
        number: How many strata there are.

    Returns:
        int64 [texts, strata, layers, experts].
    """
    device = input_device(model)
    rows, columns = len(ids), max(map(len, ids))
    places = np.concatenate([row * columns + target.astype(np.int64) for row, target in enumerate(targets)])
    owners = np.repeat(np.arange(rows) * number, [len(target) for target in targets])
    if strata is not None:
        owners += np.concatenate(strata)
    place = torch.from_numpy(places).to(device)
    chosen: dict[int, Tensor] = {}

    def collect(site: int, choice: Tensor) -> None:
        _require(choice.shape[0], rows * columns, sites[site])
        chosen[site] = choice[place.to(choice.device)]

    with recording(sites, collect):
        read_batch(model, ids)
    owner = torch.from_numpy(owners).to(device)
    return _counts(sites, [chosen[site] for site in range(len(sites))], owner, rows * number).reshape(
        rows, number, len(sites), -1
    )


def count_continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[RouterSite],
    ids: Sequence[Ints],
    new_tokens: int,
    stratum: Ints,
    number: int = 1,
) -> tuple[Integers, Integers]:
    """Let the model continue prompts greedily and count the experts of each new token as it is fed back.

    Prompts are padded on the left. A text's end, and whatever comes after it, is not counted; the last token
    written is fed back like the others.

    Args:
        ids: Token ids of each prompt.
        new_tokens: How many tokens a prompt gets at most.
        stratum: int64 [new_tokens], of each new token by its position.
        number: How many strata there are.

    Returns:
        Counts int64 [texts, strata, layers, experts] and tokens int64 [texts, strata].

    Raises:
        ModelError: the model cannot generate, or does not feed one token after the other.
    """
    device = input_device(model)
    rows, columns = len(ids), max(map(len, ids))
    tokens, mask = padded(ids, left=True)
    steps: list[list[Tensor]] = [[] for _ in sites]
    seen_prompt = [False] * len(sites)

    def collect(site: int, choice: Tensor) -> None:
        if not seen_prompt[site]:
            _require(choice.shape[0], rows * columns, sites[site])
            seen_prompt[site] = True
            return
        _require(choice.shape[0], rows, sites[site])
        steps[site].append(choice)

    ends = text_ends(model, tokenizer)
    with recording(sites, collect), torch.no_grad(), generating(model):
        written = model.generate(  # type: ignore[operator]
            input_ids=torch.from_numpy(tokens).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=new_tokens + 1,  # the last one is written only so that the one before is fed back
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            tokenizer=tokenizer,  # for stop strings that a checkpoint may ask for
            **decoding(model),
        )
    new = written[:, columns : columns + new_tokens].cpu().numpy()
    fed = len(steps[0])
    live = ~np.maximum.accumulate(np.isin(new, ends), axis=1)[:, :fed]
    text, position = np.nonzero(live)
    owner = text * number + stratum[position]
    taken = torch.from_numpy(position * rows + text).to(device)
    chosen = [
        torch.cat(list(site)).index_select(0, taken.to(site[0].device))
        if site
        else torch.zeros((0, 1), dtype=torch.int64, device=device)
        for site in steps
    ]
    counts = _counts(sites, chosen, torch.from_numpy(owner).to(device), rows * number)
    lengths = np.bincount(owner, minlength=rows * number).astype(np.int64)
    return counts.reshape(rows, number, len(sites), -1), lengths.reshape(rows, number)


def _require(found: int, given: int, site: RouterSite) -> None:
    if found != given:
        raise ModelError(f"layer {site.facts.layer}: {found} tokens reached the experts, {given} were given")


def _counts(sites: Sequence[RouterSite], chosen: list[Tensor], owner: Tensor, owners: int) -> Integers:
    """How often each owner's tokens chose each expert, int64 [owners, layers, experts].

    All layers at once: the host waits for the device one time.

    Args:
        chosen: Of each layer, [tokens, k].
        owner: [tokens], whose each token is.
    """
    experts, layers = max(site.facts.experts for site in sites), len(sites)
    keys = torch.cat(
        [
            ((owner * layers + layer)[:, None] * experts + choice.to(owner.device)).flatten()
            for layer, choice in enumerate(chosen)
        ]
    )
    size = owners * layers * experts
    if keys.device.type == "cpu":
        counts = torch.bincount(keys, minlength=size)
    else:  # bincount asks the device for the largest key first
        counts = torch.zeros(size, dtype=torch.int64, device=keys.device)
        counts.scatter_add_(0, keys, torch.ones_like(keys))
    return counts.view(owners, layers, experts).cpu().numpy()
