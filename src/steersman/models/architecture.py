"""Opening a model from outside: its decoder, its layers by true index, its routers and the experts beside
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from steersman.errors import ModelError
from steersman.limits import Router
from steersman.models.adapters import check_module, is_adapted, unwrap
from steersman.models.families import Family, attribute, family_of, has_bias, rule_of, why_looped
from steersman.models.kernels import kernel_around
from steersman.models.parallel import HIDDEN, hides_choices
from steersman.steering import Architecture

if TYPE_CHECKING:
    from steersman.models.loading import Named


@dataclass(frozen=True)
class RouterSite:
    """A router as found in a model: its facts, the module whose forward chooses (the block itself in a few
    families), the block around it, and the experts module that receives its choice.
    """

    facts: Router
    module: nn.Module
    experts: nn.Module | None
    block: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight whose product with the hidden states gives the raw scores, where it rests now."""
        return score_weight(self.module)

    @property
    def quantised_gate(self) -> nn.Module | None:
        """The layer inside a router that gives the raw scores by a quantised weight (bitsandbytes).

        None where the weight holds plain numbers.
        """
        weight = self.weight
        if weight.is_floating_point():
            return None
        return next((m for m in self.module.modules() if getattr(m, "weight", None) is weight), None)

    @property
    def correction_bias(self) -> Tensor | None:
        """The tensor that is added for selection, where it rests now (the router's or the block's)."""
        family = family_of(self.module)
        if family is None or family.correction_bias is None or not has_bias(self.module, family):
            return None
        for owner in (self.module, self.block):
            if isinstance(bias := attribute(owner, family.correction_bias), Tensor):
                return bias
        return None


def find_decoder(model: nn.Module) -> nn.Module:
    """The module whose forward runs the decoder layers (also inside a vision-language or PEFT-wrapped model).

    Raises:
        ModelError: no module with a list of decoder layers is found.
    """
    check_module(model)
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    # Some get_decoder stop at the model with the head, or give the head (ModernBERT's is called decoder).
    for candidate in (decoder, getattr(decoder, "model", None), getattr(model, "base_model", None)):
        if isinstance(candidate, nn.Module) and _layer_list(candidate) is not None:
            return candidate
    raise ModelError(
        f"{type(model).__name__} has no list of decoder layers: steering needs a transformers decoder model"
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, by true index."""
    layers = _layer_list(find_decoder(model))
    if layers is None:  # find_decoder has made sure of it
        raise ModelError("the decoder has no list of layers")
    return layers


def _layer_list(decoder: nn.Module) -> nn.ModuleList | None:
    for name in ("layers", "blocks", "h"):
        if isinstance(layers := getattr(decoder, name, None), nn.ModuleList):
            return layers
    return None


def find_routers(model: nn.Module) -> list[RouterSite]:
    """Every router of a model, by layer. What cannot be steered is there too, with the reason.

    A layer may have more than one: that of its experts comes first, then what is beside it (a router of
    attention heads, of image tokens).
    """
    config = decoder_config(model)
    sites = [
        _unless(why_looped(config, index), site)
        for index, layer in enumerate(decoder_layers(model))
        for site in _routers_of_layer(index, layer, config.hidden_size)
    ]
    if hides_choices(unwrap(model)) or hides_choices(find_decoder(model)):
        return [_unless(HIDDEN, site) for site in sites]
    return sites


def routers_beside(model: nn.Module) -> list[Router]:
    """The routers that stand beside those of the layers' experts (of attention heads, of image tokens), by
    layer, each with the reason why no plan names it.
    """
    sites = find_routers(model)
    first = {site.facts.layer: site for site in reversed(sites)}
    return [site.facts for site in sites if site is not first[site.facts.layer]]


def read_architecture(model: Named) -> Architecture:
    """The structure of a model as far as a plan depends on it, read from its modules.

    Args:
        model: The model, or its name (`load_model`); a folder with its configuration alone will do.

    Raises:
        ModelError: it cannot be opened, or has no list of decoder layers.

    Example:
        >>> steersman.read_architecture("lab:moe").routers[3].top_k
        4
    """
    from steersman.models.loading import structure_of  # which rests on this file

    model = structure_of(model, weights=False)
    config = decoder_config(model)
    routers = {site.facts.layer: site.facts for site in reversed(find_routers(model))}
    return Architecture(
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        layers=tuple(routers.get(index) for index in range(len(decoder_layers(model)))),
    )


def decoder_config(model: nn.Module) -> Any:
    """The configuration of the decoder (of a vision-language model: that of its language model)."""
    config = getattr(find_decoder(model), "config", None) or getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no configuration: steering needs a transformers model")
    return config.get_text_config()


def check_ids(model: nn.Module, largest: int, where: str) -> None:
    """Raise `ModelError` where a token id lies beyond the model's embedding."""
    embedding = getattr(find_decoder(model), "get_input_embeddings", lambda: None)()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and largest >= rows:
        raise ModelError(
            f"{where}: token id {largest} is beyond the model's {rows} embeddings: "
            "the tokenizer is not this model's"
        )


_ADAPTED = "an adapter is on its weight: merge it (merge_and_unload) or leave the router out of it"


def _routers_of_layer(index: int, layer: nn.Module, width: int) -> Iterator[RouterSite]:
    names = {module: name for name, module in layer.named_modules()}
    found = {
        router: router if _experts_of(router) is not None else parent
        for parent in layer.modules()
        for router in _routers_inside(parent, width)
    }
    shared = _count_shared(layer)
    beside = {router: reason for router in found if (reason := _beside(names[router])) is not None}
    adapted = [r for r in found if r not in beside and is_adapted(layer, names[r])]
    if adapted:  # around a router each copy of it is one more: the first of a known family speaks for all
        router = next((r for r in adapted if family_of(r) is not None), adapted[0])
        facts = replace(_facts(index, found[router], router), reason=_ADAPTED)
        yield RouterSite(facts, router, None, found[router])
        return
    sites = [
        RouterSite(
            replace(_facts(index, block, router), shared_experts=shared), router, _experts_of(block), block
        )
        for router, block in found.items()
        if router not in beside
    ]
    if len(sites) == 1:
        # A kernel may run in the place of the module that would call the router.
        yield _unless(kernel_around(layer, sites[0].module), sites[0])
    elif sites or any(_experts_of(module) is not None for module in layer.modules()):
        reason = (
            f"{len(sites)} routers in one layer" if sites else "its experts have no router of a known form"
        )
        yield RouterSite(Router(index, 0, 0, "unknown", reason=reason), layer, None, layer)
    for router, reason in beside.items():
        facts = replace(_facts(index, found[router], router), reason=reason)
        yield RouterSite(facts, router, None, found[router])


def _unless(reason: str | None, site: RouterSite) -> RouterSite:
    """A router as it is, or refused where there is a reason."""
    return site if reason is None else replace(site, facts=replace(site.facts, reason=reason))


def _beside(name: str) -> str | None:
    """Why a router of this name in its layer is not the one of the layer's (text) experts."""
    if "attn" in name or "attention" in name:
        return "it routes attention heads, not experts"
    if "vision" in name:
        return "it routes image tokens only"
    return None


def _routers_inside(parent: nn.Module, width: int) -> Iterator[nn.Module]:
    """The modules among a module's children that choose experts (a block in a few families)."""
    experts = _experts_of(parent)
    for child in parent.children():
        if _chooses(child) or (experts not in (None, child) and _looks_like_router(child, width)):
            yield child


def _chooses(module: nn.Module) -> bool:
    """Whether a module's own forward chooses by a known rule."""
    return family_of(module) is not None and all(family_of(child) is None for child in module.children())


def _experts_of(block: nn.Module) -> nn.Module | None:
    experts = getattr(block, "experts", None)
    return experts if isinstance(experts, nn.Module) else None


def _looks_like_router(module: nn.Module, width: int) -> bool:
    if family_of(module) is not None:
        return False  # known: it chooses, or what is inside it does
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and weight.shape[1] == width
        and 1 < weight.shape[0] != width
        and (hasattr(module, "top_k") or "router" in type(module).__name__.lower())
    )


def score_weight(router: nn.Module) -> Tensor:
    """The weight of a router whose product gives the scores: its own, or the last of those inside it
    outside of the experts.
    """
    if isinstance(weight := getattr(router, "weight", None), Tensor):
        return weight
    inside = [
        parameter
        for name, parameter in router.named_parameters()
        if name.endswith("weight") and parameter.dim() == 2 and "experts" not in name.split(".")
    ]
    if not inside:
        raise ModelError(f"{type(router).__name__} has no weight that gives scores")
    return inside[-1]


def _facts(index: int, block: nn.Module, router: nn.Module) -> Router:
    family = family_of(router)
    facts = Router(
        layer=index,
        experts=_whole(router, family.experts if family else "num_experts") or _rows(router),
        top_k=_whole(router, family.top_k if family else "top_k") or _whole(block, "top_k"),
        rule="unknown",
    )
    if family is None:
        return replace(facts, reason=f"the routing rule of {type(router).__name__} is not known")
    groups = _groups(router) if family.group_score is not None else None
    facts = replace(facts, rule=rule_of(router, family, groups), groups=groups)
    site = RouterSite(facts, router, _experts_of(block), block)
    return replace(facts, reason=_why_not(site, family))


def _whole(module: nn.Module, name: str) -> int:
    value = attribute(module, name)
    return value if isinstance(value, int) else 0


def _rows(router: nn.Module) -> int:
    """The scores that a router's weight gives (a quantised one has another shape)."""
    weight = score_weight(router)
    for module in router.modules():
        if getattr(module, "weight", None) is weight and isinstance(module, nn.Linear):
            return module.out_features
    return weight.shape[0]


def _groups(router: nn.Module) -> tuple[int, int] | None:
    """(n_group, topk_group), or None where every group is kept and grouping changes nothing."""
    if getattr(router, "topk_method", "group_limited_greedy") == "greedy":
        return None
    groups = (int(getattr(router, "num_group", 1) or 1), int(getattr(router, "topk_group", 1) or 1))
    return None if groups[0] == groups[1] else groups


def _count_shared(layer: nn.Module) -> int:
    """Experts of a layer that always run: as many as its configuration says, 1 where it does not."""
    for block in layer.modules():
        for name in ("shared_experts", "shared_expert", "shared_mlp"):
            if isinstance(getattr(block, name, None), nn.Module):
                return int(getattr(getattr(block, "config", None), "n_shared_experts", 1) or 1)
    return 0


def _why_not(site: RouterSite, family: Family) -> str | None:
    facts = site.facts
    if family.refused is not None:
        return family.refused
    if not 1 <= facts.top_k <= facts.experts or facts.experts < 2:
        return f"it chooses {facts.top_k} of {facts.experts} experts"
    if facts.groups is not None and facts.experts % facts.groups[0]:
        return f"{facts.experts} experts do not divide into {facts.groups[0]} groups"
    if has_bias(site.module, family) and site.correction_bias is None:
        return f"its correction bias {family.correction_bias} is missing"
    if site.experts is None and family.choice in ("experts", "skipping"):
        return "its experts are not in a module of their own"
    return None
