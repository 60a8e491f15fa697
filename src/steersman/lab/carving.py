"""A Mixture-of-Experts checkpoint carved out of a dense one, layer by layer, on any texts; and its card.

The states of the dense and of the carved model run side by side, so that each layer makes good what those
before it lost. Nothing about any behaviour enters.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from steersman.artifacts.folder import check_free, new_folder
from steersman.errors import ModelError, PairsError
from steersman.lab.carved_card import judge, readme
from steersman.lab.carved_layer import (
    CarvedLayer,
    balanced_clusters,
    co_activation,
    distil,
    expert_masses,
    fit_router,
    refit_down,
    shared_neurons,
)
from steersman.lab.carved_model import Cut, dense_ffn, moe_of, put_layer, why_not
from steersman.lab.training import readable_by_all, silent_progress
from steersman.models.architecture import decoder_layers, find_decoder
from steersman.models.encoding import longest_text
from steersman.models.identity import model_name, weights_id
from steersman.models.loading import Named, open_named
from steersman.rendering import render
from steersman.texts import Text, Texts, load_texts

ROW = 256
"""Tokens of a row: texts are read one after the other and cut into rows."""
CARD = "carve.json"
_HELD_OUT_IN = 5
_FEWEST_ROWS = 10
_READ_AT_ONCE = 16
_CLUSTERED_BY = 3072
"""Tokens by which neurons are told apart."""


def carve(
    model: Named,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str | Path | Texts],
    out_dir: str | Path,
    *,
    experts: int = 32,
    top_k: int = 24,
    shared: int | None = None,
    tokens: int = 16384,
    distillation: int = 0,
    random: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Carve a dense model into a Mixture-of-Experts checkpoint that plain transformers loads.

    The FFN of each layer becomes a shared expert, of the neurons that fire most, and experts of equal size,
    of those that fire together (`carved_layer`); attention, norms and embeddings are the dense model's.

    Args:
        model: A dense model (`carved_model.ACCEPTED`), or its name.
        tokenizer: Its tokenizer; None takes that of a model named.
        texts: Sources of texts, each as `load_texts` takes it. The first four fifths of a source are fitted
            on, the same number of tokens of each as far as it has them; its last fifth judges.
        out_dir: Where the checkpoint goes, with README.md and carve.json, which say how far it is from the
            dense model.
        experts, top_k: How many experts a layer has, and how many of them a token.
        shared: Neurons that always run. Default: about a third; none for Qwen3.
        tokens: Tokens to fit on; half as many judge.
        distillation: Steps, of 2048 tokens, by which each layer is trained afterwards on what the dense model
            adds.
        random: A control: the neurons of the experts are shuffled between them, all else alike.
        seed: Of everything random. The same seed gives the same checkpoint on the same machine on one thread.
        progress: Show a progress bar on stderr.

    Returns:
        The card: what carve.json holds.

    Raises:
        ModelError: no class with experts computes what the model does, or its neurons cannot be cut so.
        PairsError: a text cannot be read, or there are too few.
        ArtifactError: the place is occupied, or cannot be written.
    """
    check_free(out_dir, ours=set())
    dense, tokenizer = open_named(model, tokenizer)
    name = model_name(dense)[0] or type(dense).__name__
    if reason := why_not(dense.config):
        raise ModelError(f"{name}: {reason}")
    cut = Cut.of(dense.config, experts, top_k, shared)
    started = time.monotonic()
    sources = _read(
        tokenizer, [of if isinstance(of, Texts) else load_texts(of) for of in texts], dense, tokens
    )
    moe = moe_of(dense, cut)
    rng = torch.Generator().manual_seed(seed)
    rows = torch.cat([source.fitted for source in sources])
    rows = rows[torch.randperm(len(rows), generator=rng)].to(dense.device)
    how = _How(cut, distillation, random, rng)
    layers = []
    with new_folder(out_dir, ours=set()) as place, torch.no_grad():
        bar = tqdm(total=len(decoder_layers(moe)), desc="carve", unit="layer", delay=1, disable=not progress)
        with bar:
            for number, (layer, told) in enumerate(_carved_layers(dense, moe, rows, how)):
                put_layer(moe, number, layer)
                layers.append(told)
                bar.update()
        card = {
            "dense": name,
            "weights": weights_id(dense),
            "class": moe.config.model_type,
            **vars(cut),
            "random": random,
            "seed": seed,
            "distillation": distillation,
            "fitted_tokens": rows.numel(),
            "row": rows.shape[1],
            **judge(
                dense, moe, [(source.name, source.sha256, source.judged) for source in sources], progress
            ),
            "layers": layers,
            "seconds": round(time.monotonic() - started, 1),
            "threads": torch.get_num_threads(),
            "versions": {of: version(of) for of in ("steersman", "torch", "transformers")},
        }
        with silent_progress():
            moe.save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        (place / "README.md").write_text(readme(card), encoding="utf-8")
        readable_by_all(place)
    return card


@dataclass(frozen=True)
class _How:
    """What a layer is carved by."""

    cut: Cut
    distillation: int
    random: bool
    rng: torch.Generator


@dataclass(frozen=True)
class _Source:
    """Rows of token ids of one source of texts: [rows, tokens] that are fitted on, and that judge."""

    name: str
    sha256: str
    fitted: Tensor
    judged: Tensor


def _read(
    tokenizer: PreTrainedTokenizerBase, texts: list[Texts], dense: PreTrainedModel, tokens: int
) -> list[_Source]:
    """Rows of every source: equal shares, but what short ones lack is left to the longer."""
    length = min(ROW, longest_text(dense) or ROW)
    whole = [(of, *_rows_of(tokenizer, of, length, tokens)) for of in texts]
    for of, _, judged in whole:
        if len(judged) < 2:
            raise PairsError(
                f"{of.name}: its last fifth is {len(judged)} rows of {length} tokens, and at least 2 judge"
            )
    fitted_shares = _shares([len(fitted) for _, fitted, _ in whole], tokens // length)
    judged_shares = _shares([len(judged) for _, _, judged in whole], tokens // (2 * length))
    if sum(fitted_shares) < _FEWEST_ROWS:
        raise PairsError(
            f"{texts[0].name}: {sum(fitted_shares)} rows of {length} tokens to fit on; "
            f"at least {_FEWEST_ROWS} are needed"
        )
    return [
        _Source(of.name, of.sha256, fitted[:share], judged[: max(2, judges)])
        for (of, fitted, judged), share, judges in zip(whole, fitted_shares, judged_shares, strict=True)
    ]


def _rows_of(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, length: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Rows of the first four fifths of texts, and of the last fifth: others' neighbours, if they have any."""
    cut = len(texts) - len(texts) // _HELD_OUT_IN
    fitted, judged = list(texts)[:cut], list(texts)[cut:]
    return _packed(tokenizer, fitted, length, tokens), _packed(tokenizer, judged, length, tokens)


def _packed(tokenizer: PreTrainedTokenizerBase, texts: list[Text], length: int, tokens: int) -> Tensor:
    ids: list[int] = []
    for text in texts:
        if len(ids) >= tokens:
            break
        try:
            written, special = render(tokenizer, text.content)
        except PairsError as error:
            raise PairsError(f"{text.where}: {error}") from None
        ids += tokenizer(written, add_special_tokens=special, verbose=False)["input_ids"]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length], dtype=torch.long).view(rows, length)


def _shares(have: list[int], wanted: int) -> list[int]:
    """How many of each, `wanted` together if there are so many, as equal as they can be."""
    shares, left = [0] * len(have), wanted
    for place, number in enumerate(sorted(range(len(have)), key=lambda number: (have[number], number))):
        shares[number] = min(have[number], left // (len(have) - place))
        left -= shares[number]
    return shares


def _carved_layers(
    dense: PreTrainedModel, moe: PreTrainedModel, rows: Tensor, how: _How
) -> Iterator[tuple[CarvedLayer, dict[str, Any]]]:
    """Every layer carved, and what is told of it.

    Both models' states [rows, tokens, width] go through the carved one's attention, which is the dense one's.
    """
    arguments = _arguments(moe, rows[:1])
    activation = ACT2FN[dense.config.hidden_act]
    of_dense = moe.get_input_embeddings()(rows).float()
    of_moe = of_dense.clone()
    held = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    held[: max(1, len(rows) // 10)] = True
    for number, (layer, old) in enumerate(zip(decoder_layers(moe), decoder_layers(dense), strict=True)):
        attend, normed = _in_float(layer, arguments[number])
        gate, up, down = dense_ffn(old)
        whole = CarvedLayer(gate, up, down, gate[:0], len(gate), 0, activation)
        of_dense, of_moe = attend(of_dense), attend(of_moe)
        for part in torch.split(of_dense, _READ_AT_ONCE):
            x = normed(part).flatten(0, 1)
            part += (whole.active(x) @ down.T).view_as(part)
        x, goal = normed(of_moe).flatten(0, 1), (of_dense - of_moe).flatten(0, 1)
        carved, told = carve_layer(whole, x, goal, held.flatten(), how)
        of_moe = of_moe + carved(x).view_as(of_moe)
        told["stream_error"] = _share(of_dense - of_moe, of_dense)
        yield carved, told


def carve_layer(
    whole: CarvedLayer, x: Tensor, goal: Tensor, held: Tensor, how: _How
) -> tuple[CarvedLayer, dict[str, Any]]:
    """One FFN carved.

    Args:
        whole: The FFN, all its neurons shared.
        x: Its input in the carved model [tokens, width].
        goal: What it is to add there [tokens, width].
        held: Tokens that choose between fits [tokens], bool.
        how: What it is carved by.
    """
    cut = how.cut
    active = whole.active(x)
    parts = active[:: max(1, len(x) // _CLUSTERED_BY)].abs() * whole.down.norm(dim=0)
    order = _sorted_neurons(parts, how).to(x.device)
    active = active[:, order]
    layer = replace(
        whole,
        gate=whole.gate[order],
        up=whole.up[order],
        down=whole.down[:, order],
        router=whole.gate.new_zeros(cut.experts, x.shape[1]),
        shared=cut.shared,
        top_k=cut.top_k,
    )
    masses = expert_masses(active, layer)
    layer = replace(layer, router=fit_router(x[~held], masses[~held], cut.top_k, how.rng))
    weights = layer.weights(x)
    used = weights[:, cut.shared :: cut.size] > 0
    best = torch.zeros_like(used).scatter_(1, masses.topk(cut.top_k).indices, True)
    told: dict[str, Any] = {
        "router_hits": round((used & best).sum().item() / best.sum().item(), 4),
        "least_used": round(used.double().mean(0).min().item(), 4),
        "most_used": round(used.double().mean(0).max().item(), 4),
    }
    refit = refit_down(active * weights, goal, layer.down, held)
    as_cut, layer = layer, replace(layer, down=refit.down)
    if how.distillation:
        layer = distil(layer, x, goal, held, how.rng, how.distillation)
    errors = {
        name: _share(goal[held] - of(x[held]), goal[held])
        for name, of in (("error_as_cut", as_cut), ("error", layer))
    }
    return layer, {**told, "ridge": refit.ridge, **errors}


def _sorted_neurons(parts: Tensor, how: _How) -> Tensor:
    """The neurons in a carved layer's order: the shared, then cluster by cluster."""
    cut = how.cut
    shared = shared_neurons(parts, cut.shared).cpu()
    is_shared = torch.zeros(parts.shape[1], dtype=torch.bool)
    is_shared[shared] = True
    rest = torch.arange(parts.shape[1])[~is_shared]
    labels = balanced_clusters(co_activation(parts[:, rest.to(parts.device)]), cut.experts, how.rng)
    if how.random:
        labels = labels[torch.randperm(len(labels), generator=how.rng)]
    return torch.cat([shared, rest[labels.argsort(stable=True)]])


def _arguments(moe: PreTrainedModel, row: Tensor) -> list[dict[str, Any]]:
    """What each decoder layer's attention is given beside the states, for rows of this length."""
    seen: list[dict[str, Any]] = []

    def listen(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        kept = {name: given.get(name) for name in ("position_embeddings", "attention_mask", "position_ids")}
        seen.append({name: _as_float(value) for name, value in kept.items()})

    handles = [layer.register_forward_pre_hook(listen, with_kwargs=True) for layer in decoder_layers(moe)]
    try:
        with torch.no_grad():
            find_decoder(moe)(input_ids=row, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _as_float(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_float, value))
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _in_float(
    layer: nn.Module, arguments: dict[str, Any]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A decoder layer in float32: states after attention, and the FFN's input from them."""
    names = ("self_attn", "input_layernorm", "post_attention_layernorm")
    attention, before, after = (copy.deepcopy(getattr(layer, name)).float() for name in names)

    def attend(states: Tensor) -> Tensor:
        parts = torch.split(states, _READ_AT_ONCE)
        return torch.cat([part + attention(before(part), **arguments)[0] for part in parts])

    return attend, after


def _share(left: Tensor, of: Tensor) -> float:
    """A squared error as a share of what there was."""
    return round((left.double().square().sum() / of.double().square().sum()).item(), 5)
