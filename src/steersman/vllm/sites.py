"""Finding, by structure, where a model of the engine is edited, and putting the operations there.

A decoder layer is an entry of the list of layers; a router is the engine's mixture-of-experts runner, whose
gate gives the raw scores. Where the engine's own rule keeps the promise on edited scores, they are edited as
the gate gives them; where it does not (a bias for selection, a sigmoid), the choice is made anew after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index

from steersman.errors import ServingError
from steersman.experts.bounds import edit_scores
from steersman.vllm.bank import Places, RouterPlace
from steersman.vllm.routing import Rule

WHOLE_STREAM = frozenset({"PhiMoEDecoderLayer"})
"""Decoder layers whose first output is the whole stream; in all others the second is added to it."""


@dataclass(frozen=True)
class RouterSite:
    """A router of the engine's model: `reason` says why it cannot be steered; None if it can."""

    layer: int
    runner: MoERunner
    gate: nn.Module | None
    place: RouterPlace
    reason: str | None = None


@dataclass(frozen=True)
class Sites:
    """Where this worker's part of a model can be edited."""

    routers: tuple[RouterSite, ...]
    blocks: Mapping[int, nn.Module]
    width: int

    def chosen(self, routers: Iterable[int] | None, blocks: Iterable[int] | None) -> Sites:
        """Those of some layers only; None: all that can be steered.

        Raises:
            ServingError: a layer that is here has no router, or one that cannot be steered.
        """
        wanted = None if routers is None else set(routers)
        for layer in sorted((wanted or set()) & set(self.blocks) - {site.layer for site in self.routers}):
            raise ServingError(f"the router of layer {layer} cannot be steered here: it is not found")
        for site in self.routers:
            if wanted is not None and site.layer in wanted and site.reason is not None:
                raise ServingError(f"the router of layer {site.layer} cannot be steered here: {site.reason}")
        return Sites(
            tuple(s for s in self.routers if s.reason is None and (wanted is None or s.layer in wanted)),
            {i: block for i, block in self.blocks.items() if blocks is None or i in set(blocks)},
            self.width,
        )

    def counted(self) -> tuple[RouterSite, ...]:
        """The routers whose choices can be counted.

        Raises:
            ServingError: there are others.
        """
        for site in self.routers:
            reason = _why_not_counted(site.runner)
            if reason is not None:
                raise ServingError(f"the experts of layer {site.layer} cannot be counted here: {reason}")
        return self.routers

    @property
    def places(self) -> Places:
        """What the bank needs to know of them."""
        return Places(tuple(site.place for site in self.routers), tuple(self.blocks), self.width)


def find_sites(model: nn.Module, config: Any) -> Sites:
    """Every router and decoder layer of a model as it is in this worker.

    Args:
        model: The engine's.
        config: The configuration of its text model.

    Raises:
        ServingError: the model has no list of decoder layers.
    """
    modules = dict(model.named_modules())
    layers = _decoder_layers(modules, config.num_hidden_layers)
    routers = tuple(
        _router_site(name, module, modules)
        for name, module in modules.items()
        if isinstance(module, MoERunner) and name.startswith(layers + ".")
    )
    blocks = {
        index: layer
        for index, layer in enumerate(modules[layers].children())
        if not isinstance(layer, PPMissingLayer)
    }
    return Sites(routers, blocks, config.hidden_size)


def _decoder_layers(modules: Mapping[str, nn.Module], count: int) -> str:
    for name, module in modules.items():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and name.split(".")[-1] in ("layers", "h")
        ):
            return name
    raise ServingError(f"the engine's model has no list of {count} decoder layers: it cannot be steered")


def _router_site(name: str, runner: MoERunner, modules: Mapping[str, nn.Module]) -> RouterSite:
    layer = extract_layer_index(runner.layer_name)
    experts = runner.moe_config.num_logical_experts
    gate = runner.gate
    if gate is None:
        parent = modules[name.rpartition(".")[0]]
        gates = [
            child
            for child in parent.children()
            if child is not runner and getattr(child, "output_size", None) == experts
        ]
        gate = gates[0] if len(gates) == 1 else None
    rule, reason = _rule(runner)
    softmax_first = rule is None and _takes_softmax_first(runner.router)
    place = RouterPlace(layer, experts, rule, softmax_first)
    if reason is None:
        reason = _why_not(runner, gate, rule)
    return RouterSite(layer, runner, gate, place, reason)


def _rule(runner: MoERunner) -> tuple[Rule | None, str | None]:
    """A router's rule where it has to be written out, and why the router cannot be steered, if so."""
    router = runner.router
    kind = type(router).__name__
    if kind not in (
        "CPURouter",
        "CustomRoutingRouter",
        "FusedTopKRouter",
        "FusedTopKBiasRouter",
        "GroupedTopKRouter",
    ):
        return None, f"the engine routes by {kind}"
    if (
        getattr(router, "_hash_indices_table", None) is not None
        or getattr(router, "hash_indices_table", None) is not None
    ):
        return None, "its experts come from token ids, not from scores"
    if getattr(router, "bias_vl", None) is not None:
        return None, "its bias depends on what kind of token it routes"
    function = getattr(router, "custom_routing_function", None)
    if function is not None:
        kept = keeps_promise(
            function, runner.moe_config.num_logical_experts, router.top_k, router.renormalize
        )
        return None, None if kept else f"{function.__name__} does not keep the promise on edited scores"
    scoring: Any = getattr(router, "scoring_func", "softmax")
    bias = getattr(router, "e_score_correction_bias", None)
    if scoring == "softmax" and bias is None:
        return None, None
    if scoring not in ("softmax", "sigmoid", "sqrtsoftplus"):
        return None, f"the engine scores its experts by {scoring}"
    groups = None
    if getattr(router, "use_grouped_topk", kind == "GroupedTopKRouter"):
        groups = (int(router.num_expert_group), int(router.topk_group))
    return (
        Rule(
            top_k=router.top_k,
            scoring=scoring,
            renormalised=bool(router.renormalize),
            groups=groups,
            group_score="max" if bias is None else "top2",
            bias=bias,
            scaling=float(getattr(router, "routed_scaling_factor", 1.0)),
        ),
        None,
    )


def keeps_promise(
    function: Callable[..., tuple[Tensor, Tensor]], experts: int, top_k: int, renormalise: bool
) -> bool:
    """Whether a model's own routing function chooses an expert at λ = 1, and none at −1, on edited scores
    of every size: it is tried.
    """
    generator = torch.Generator().manual_seed(0)
    for size in (0.1, 3.0, 300.0):
        scores = torch.randn(64, experts, generator=generator) * size
        strengths = torch.zeros(64, experts)
        strengths[:, experts // 2], strengths[:, 0] = 1.0, -1.0
        edited = edit_scores(scores, strengths)
        try:
            _, ids = function(
                hidden_states=torch.zeros(64, 8), gating_output=edited, topk=top_k, renormalize=renormalise
            )
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return False
        if not bool((ids == experts // 2).any(dim=-1).all()) or bool((ids == 0).any()):
            return False
    return True


def _takes_softmax_first(router: Any) -> bool:
    if getattr(router, "custom_routing_function", None) is not None:
        return False
    return type(router).__name__ != "CPURouter" or bool(router.use_grouped_topk)


def _why_not(runner: MoERunner, gate: nn.Module | None, rule: Rule | None) -> str | None:
    if runner.moe_config.is_sequence_parallel:
        return "tokens are spread over ranks there (sequence parallelism)"
    if rule is None:
        if runner._fse_fuse_gate:
            return "its gate is fused with that of shared experts"
        return None if gate is not None else "its gate is not found"
    if runner.is_monolithic:
        return "its kernel chooses experts inside, by a rule that edited scores cannot keep the promise of"
    if runner.do_naive_dispatch_combine:
        return "tokens of all data-parallel ranks are gathered before it chooses"
    return None


def _why_not_counted(runner: MoERunner) -> str | None:
    if runner.moe_config.is_sequence_parallel:
        return "tokens are spread over ranks there (sequence parallelism)"
    if runner.is_monolithic:
        return "its kernel chooses experts inside"
    if runner.do_naive_dispatch_combine:
        return "tokens of all data-parallel ranks are gathered before it chooses"
    return None


def attach_counting(routers: Iterable[RouterSite], device: torch.device) -> None:
    """Put the operation that counts after each router's choice, edited or not."""
    for index, site in enumerate(routers):
        number = torch.tensor([index], dtype=torch.int32, device=device)
        _after_choice(site, functools.partial(_count, number))


def attach(sites: Sites, device: torch.device) -> None:
    """Put the operations into the model, before it is compiled or captured."""
    for index, site in enumerate(sites.routers):
        number = torch.tensor([index], dtype=torch.int32, device=device)
        if site.place.rule is None:
            module = site.gate
            if module is None:
                raise ServingError(f"the gate of layer {site.layer} is not found")
            module.register_buffer("steersman_site", number, persistent=False)
            module.register_forward_hook(_edit_scores)
        else:
            _after_choice(site, functools.partial(_choose, number))
    for index, block in enumerate(sites.blocks.values(), start=len(sites.routers)):
        number = torch.tensor([index], dtype=torch.int32, device=device)
        block.register_buffer("steersman_site", number, persistent=False)
        whole = type(block).__name__ in WHOLE_STREAM
        block.register_forward_hook(_edit_whole_stream if whole else _edit_states)


def _edit_scores(gate: nn.Module, args: Any, output: Any) -> None:
    scores = output[0] if isinstance(output, tuple) else output
    torch.ops.steersman.edit_scores_(scores, gate.steersman_site)


def _edit_states(block: nn.Module, args: Any, output: Any) -> None:
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    torch.ops.steersman.edit_states_(hidden, residual, block.steersman_site)


def _edit_whole_stream(block: nn.Module, args: Any, output: Any) -> None:
    torch.ops.steersman.edit_states_(output[0], None, block.steersman_site)


def _choose(number: Tensor, scores: Tensor, weights: Tensor, ids: Tensor) -> None:
    torch.ops.steersman.choose_(scores, weights, ids, number)


def _count(number: Tensor, scores: Tensor, weights: Tensor, ids: Tensor) -> None:
    torch.ops.steersman.count_(ids, number)


def _after_choice(site: RouterSite, operation: Callable[[Tensor, Tensor, Tensor], None]) -> None:
    """Run an operation on (scores, weights, ids) after a router's choice and those put there before."""
    router: Any = site.runner.router
    original: Callable[..., tuple[Tensor, Tensor]] = router._compute_routing

    def compute_routing(
        hidden_states: Tensor, router_logits: Tensor, indices_type: Any, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = original(hidden_states, router_logits, indices_type, input_ids=input_ids)
        operation(router_logits, weights, ids)
        return weights, ids

    router._compute_routing = compute_routing
