"""Estimates of all experts' effects at once: one forward and backward, and what each edit changes locally.

To first order, an edit at a layer's router changes a text's value by Σ over tokens of ∇y · Δy, where y is
what the layer's experts add up to and ∇y the gradient of the value. Δy is exact: the model's own router says,
under the edit, which experts enter and with which weights, Δy = Σ_j w′_j f_j(x) − Σ_j w_j f_j(x). So only the
numbers ∇y · f_j(x) are needed, for the experts that any edit brings in, and each is computed once.

The plain gradient · w f(x), without what enters instead, ranks experts much worse (docs/screening.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steersman.evaluation.screening.exact import Edit, Floats, Instrument
from steersman.evaluation.screening.expert_calls import (
    CannotEstimate,
    ExpertCall,
    read_call,
    single_experts,
)
from steersman.evaluation.screening.texts import Batch
from steersman.experts.router_tables import token_edit
from steersman.models.architecture import RouterSite
from steersman.models.replacing import replace_method
from steersman.models.replay import positions_of

MOST_NUMBERS = 1 << 21
"""Numbers of a tensor that is made at a time: tokens × edits × width."""


class _Given(Exception):
    """The experts have been given their tokens: the rest of the block need not run."""


@dataclass
class _Layer:
    """What one layer's experts were given, what they gave, and the gradient there."""

    block: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    call: ExpertCall | None = None
    output: Tensor | None = None
    leaf: Tensor | None = None


def estimates(
    instrument: Instrument, batch: Batch, edits: dict[int, list[Edit]], plan: Sequence[Edit] = ()
) -> tuple[Floats, dict[int, Floats]]:
    """The batch's values under a plan, and by layer the estimated change of each when an edit joins it alone,
    [edits, rows].

    Raises:
        CannotEstimate: the experts cannot be called one by one, or give no gradient.
    """
    layers, values = _with_gradients(instrument, batch, plan)
    found: dict[int, Floats] = {}
    for layer, of_layer in edits.items():
        site = instrument.sites[layer]
        gradient = layers[layer].leaf
        if gradient is None:
            raise CannotEstimate(f"the experts of layer {layer} did not run")
        own = [edit for edit in plan if edit[0] == layer]
        joined = [[*own, edit] for edit in of_layer]
        found[layer] = _changes(instrument, batch, site, layers[layer], gradient, joined)
    return values, found


def _with_gradients(
    instrument: Instrument, batch: Batch, plan: Sequence[Edit]
) -> tuple[dict[int, _Layer], Floats]:
    """One forward and backward under a plan; `leaf` is then the gradient at the experts' output."""
    layers = {layer: _Layer() for layer in instrument.sites}
    rows = torch.arange(batch.rows, device=instrument.device)
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(_frozen(instrument.model))
        stack.enter_context(instrument.steered(batch, plan))
        for layer, site in instrument.sites.items():
            if site.experts is None or site.experts is site.block:
                raise CannotEstimate(f"the experts of layer {layer} are not in a module of their own")
            stack.callback(replace_method(site.block, "forward", _noting_block(layers[layer])))
            stack.callback(replace_method(site.experts, "forward", _with_leaf(layers[layer], site)))
        for module in instrument.anatomy.layers:
            stack.callback(replace_method(module, "forward", _run_again))
        try:
            logits = instrument.anatomy.forward(batch.ids, batch.mask, positions_of(batch.mask), batch.keep)
            values = batch.values(logits, rows.to(logits.device))
            leaves = [layers[layer].leaf for layer in layers]
            gradients = torch.autograd.grad(values.sum(), [leaf for leaf in leaves if leaf is not None])
        except RuntimeError as error:
            raise CannotEstimate(f"its forward gives no gradient ({error})") from None
    for layer, gradient in zip([n for n in layers if layers[n].leaf is not None], gradients, strict=True):
        layers[layer].leaf = gradient.reshape(-1, gradient.shape[-1])
    instrument.rows_run += batch.rows
    return layers, values.detach().cpu().numpy()


def _run_again(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer of which the input alone is kept: it is run again where the gradient passes (Chen et al. 2016,
    arXiv 1604.06174). All that its experts compute would be a hundred times as much.
    """
    return checkpoint(original, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _noting_block(found: _Layer) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found.block = (_detached(args), _detached(kwargs))
        return original(*args, **kwargs)

    return forward


def _with_leaf(found: _Layer, site: RouterSite) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if found.leaf is not None:  # run again, for the gradient
            return output + found.leaf
        if not isinstance(output, Tensor):
            raise CannotEstimate("its experts give more than their sum")
        found.call = read_call(site, _detached(args), _detached(kwargs))
        found.output = output.detach().reshape(-1, output.shape[-1])
        found.leaf = torch.zeros_like(output, requires_grad=True)
        return output + found.leaf

    return forward


def _changes(
    instrument: Instrument,
    batch: Batch,
    site: RouterSite,
    seen: _Layer,
    gradient: Tensor,
    edits: list[list[Edit]],
) -> Floats:
    """Σ over a row's tokens of ∇y · Δy, float64 [edits, rows]; each of `edits` is all that the layer has."""
    call, block = seen.call, seen.block
    if call is None or block is None or seen.output is None:
        raise CannotEstimate("its experts did not run")
    in_scope = batch.in_scope.reshape(-1).to(gradient.device)
    # In the last layer all but the positions that are read have none.
    tokens = (in_scope & (gradient != 0).any(dim=-1)).nonzero().squeeze(1)
    ids, weights = call.mixture()
    if len(ids) != len(in_scope) or len(gradient) != len(in_scope):
        raise CannotEstimate("its experts are given other tokens than the model")
    _check_reconstruction(site, seen, tokens[:16])
    row_of = tokens // batch.columns
    found = torch.zeros(len(edits), batch.rows, dtype=torch.float64, device=gradient.device)
    if len(tokens) == 0:
        return found.cpu().numpy()
    states = call[call.states].reshape(-1, call[call.states].shape[-1])
    mixtures = _mixtures(instrument, site, block, tokens, edits)
    scores = _Scores(site, call, states[tokens], gradient[tokens])
    own = scores.weigh(ids[tokens][None], weights[tokens][None])
    for number, other_ids, other_weights in mixtures:
        change = scores.weigh(other_ids, other_weights) - own
        found[number : number + len(change)].index_add_(1, row_of, change.double())
    return found.cpu().numpy()


class _Scores:
    """∇y · f_j(x) of some tokens, for each expert once it is needed."""

    def __init__(self, site: RouterSite, call: ExpertCall, states: Tensor, gradient: Tensor) -> None:
        self._site, self._call, self._states, self._gradient = site, call, states, gradient
        self._known = torch.zeros(len(states), site.facts.experts, dtype=torch.bool, device=states.device)
        self._scores = torch.zeros(self._known.shape, device=states.device)

    def weigh(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Σ_j w_j ∇y · f_j(x), [edits, tokens], from [edits, tokens, k]."""
        needed = torch.zeros_like(self._known)
        needed.scatter_(1, ids.transpose(0, 1).reshape(len(needed), -1), True)
        self._compute((needed & ~self._known).nonzero(as_tuple=True))
        picked = self._scores.expand(len(ids), -1, -1).gather(2, ids)
        return (picked * weights).sum(dim=-1)

    def _compute(self, pairs: tuple[Tensor, ...]) -> None:
        size = max(1, MOST_NUMBERS // self._states.shape[1])
        for start in range(0, len(pairs[0]), size):
            token, expert = (of[start : start + size] for of in pairs)
            output = single_experts(self._site, self._call, self._states[token], expert)
            self._scores[token, expert] = (output.float() * self._gradient[token].float()).sum(dim=-1)
        self._known[pairs] = True


def _check_reconstruction(site: RouterSite, seen: _Layer, tokens: Tensor) -> None:
    """Raise CannotEstimate unless single experts' outputs, weighed, give what the experts gave together."""
    call, output = seen.call, seen.output
    if call is None or output is None or len(tokens) == 0:
        return
    ids, weights = call.mixture()
    states = call[call.states].reshape(-1, call[call.states].shape[-1])[tokens]
    k = ids.shape[1]
    try:
        singles = single_experts(site, call, states.repeat_interleave(k, dim=0), ids[tokens].reshape(-1))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise CannotEstimate(f"its experts cannot be called one by one ({error})") from None
    whole = (singles.float().view(len(tokens), k, -1) * weights[tokens, :, None]).sum(dim=1)
    wanted = output[tokens].float()
    tolerance = 1e-3 if output.dtype == torch.float32 else 0.05
    if whole.shape != wanted.shape or (whole - wanted).norm() > tolerance * wanted.norm().clamp(min=1e-6):
        raise CannotEstimate("its experts one by one do not add up to what they give together")


def _mixtures(
    instrument: Instrument,
    site: RouterSite,
    block: tuple[tuple[Any, ...], dict[str, Any]],
    tokens: Tensor,
    edits: list[list[Edit]],
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number of the first edit, ids, weights [edits, tokens, k]): what the experts would be given.

    The block itself runs, until it hands the tokens to its experts; where that gives the same, without what
    else it computes (a shared expert, which would take more than all the rest).
    """
    args, kwargs = block
    states = args[0] if args else kwargs.get("hidden_states")
    others = [
        value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor) and value is not states
    ]
    if not isinstance(states, Tensor) or others:
        raise CannotEstimate("its blocks are given more than hidden states")
    flat = states.reshape(-1, states.shape[-1])[tokens]
    size = max(1, MOST_NUMBERS // max(1, flat.numel()))
    alone = _routes_alone(instrument, site, states, flat[:16], edits[0])
    for start in range(0, len(edits), size):
        chunk = edits[start : start + size]
        many = flat.repeat(len(chunk), 1)
        given = _until_experts(instrument, site, _as_given(states, many), chunk, alone=alone)
        ids, weights = given.mixture()
        if len(ids) != len(many):
            raise CannotEstimate("its experts are given other tokens than the block")
        yield start, ids.view(len(chunk), len(tokens), -1), weights.view(len(chunk), len(tokens), -1)


def _as_given(states: Tensor, flat: Tensor) -> Tensor:
    return flat.view(1, *flat.shape) if states.dim() == 3 else flat


def _routes_alone(
    instrument: Instrument, site: RouterSite, states: Tensor, some: Tensor, edits: list[Edit]
) -> bool:
    """Whether a block's router and experts alone give what the whole block gives."""
    given = _as_given(states, some)
    whole = _until_experts(instrument, site, given, [edits], alone=False)
    try:
        alone = _until_experts(instrument, site, given, [edits], alone=True)
    except (CannotEstimate, LookupError, AttributeError):
        return False
    pairs = zip((whole[whole.states], *whole.mixture()), (alone[alone.states], *alone.mixture()), strict=True)
    return all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)


def _beside(site: RouterSite) -> list[nn.Module]:
    """A block's children that neither route nor are its experts."""
    return [
        child
        for child in site.block.children()
        if child is not site.experts and all(module is not site.module for module in child.modules())
    ]


def _until_experts(
    instrument: Instrument, site: RouterSite, states: Tensor, edits: list[list[Edit]], *, alone: bool
) -> ExpertCall:
    strengths = torch.zeros(len(edits), site.facts.experts)
    for row, of_row in enumerate(edits):
        for _, expert, strength in of_row:
            strengths[row, expert] = strength
    tokens = states.shape[-2] // len(edits)
    index = torch.arange(len(edits)).repeat_interleave(tokens).to(states.device)
    edit = token_edit(strengths.to(states.device), site.facts, index)
    caught: list[ExpertCall] = []

    def stop(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        caught.append(read_call(site, args, kwargs))
        raise _Given

    def idle(original: Callable[..., Any], hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden

    try:
        with ExitStack() as stack, torch.no_grad(), instrument.edits.given({site.facts.layer: edit}):
            stack.callback(replace_method(site.experts, "forward", stop))  # type: ignore[arg-type]
            for module in _beside(site) if alone else ():
                stack.callback(replace_method(module, "forward", idle))
            site.block(states)
    except _Given:
        return caught[0]
    except (RuntimeError, TypeError, ValueError) as error:
        raise CannotEstimate(f"its blocks cannot be run alone ({error})") from None
    raise CannotEstimate("its blocks do not call their experts")


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_detached(entry) for entry in value)
    return {name: _detached(entry) for name, entry in value.items()} if isinstance(value, dict) else value


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the weights, which nobody asks for."""
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
