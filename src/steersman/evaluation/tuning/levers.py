"""From what a user has found (concepts, a map, a contrast, a screen) to the lever that is tuned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.concepts.affine_map import AffineMap
from steersman.concepts.concept import ConceptVector
from steersman.concepts.transplant_check import check_source, mapped_layers
from steersman.edits import Scope, as_layers
from steersman.errors import ArchitectureMismatch, PlanError, WeightsMismatch, told
from steersman.evaluation.controls import base_rates
from steersman.evaluation.screening.exact import instrument
from steersman.evaluation.screening.sizes import usage
from steersman.evaluation.screening.texts import Reading
from steersman.evaluation.tasks import Task
from steersman.evaluation.tuning.candidates import DOSES, Experts, Lever, Vectors
from steersman.evaluation.tuning.costs import prompt_alone
from steersman.experts.causal import CausalScreen
from steersman.experts.contrast import RoutingContrast
from steersman.models.architecture import find_routers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tunable = (
    ConceptVector
    | RoutingContrast
    | CausalScreen
    | tuple[AffineMap, ConceptVector | Mapping[str, ConceptVector]]
    | Mapping[str, ConceptVector]
)
"""What can be tuned: concepts of the model itself (several by name: the best is chosen), concepts with the
map that leads to the model, experts by their risk differences, or by their causal effects.
"""


def lever_of(
    what: Tunable,
    *,
    side: str,
    layers: Iterable[int] | None = None,
    scopes: Sequence[Scope] = (),
    doses: Sequence[float] = (),
) -> tuple[Lever, list[dict[str, Any]]]:
    """The lever, and what it was made from.

    Raises PlanError for what cannot be tuned, or options that do not go with it; WeightsMismatch and
    ArchitectureMismatch for concepts and a map of different models.
    """
    reverse = side == "negative"
    if isinstance(what, RoutingContrast | CausalScreen):
        if layers is not None or doses:
            raise PlanError("layers and doses are of vectors; experts are tuned by kind and number")
        # Of a screen all experts, the chosen set first: how many of them is what tuning finds out.
        ranking = (
            what.order(reverse=reverse) if isinstance(what, CausalScreen) else what.ranking(reverse=reverse)
        )
        if not ranking:
            why = what.reason if isinstance(what, CausalScreen) else "no expert differs between its sides"
            raise PlanError(f"there is no expert to tune: {why}")
        kind = "causal_screen" if isinstance(what, CausalScreen) else "routing_contrast"
        source = {"kind": kind, "name": what.model, "sha256": what.sha256}
        scope = (what.scope,) if isinstance(what, CausalScreen) else ("all",)
        lever = Experts(
            ranking=ranking,
            architecture=what.architecture,
            weights_id=what.weights_id,
            model=what.model,
            revision=what.revision,
            scopes=tuple(scopes) or scope,
            made_of={"by": kind, "reverse": reverse, "from": [source]},
            rates=base_rates(what) if isinstance(what, RoutingContrast) else None,
        )
        return lever, [source]
    bridge, concepts = what if isinstance(what, tuple) else (None, what)
    named = {"": concepts} if isinstance(concepts, ConceptVector) else concepts
    if (
        not isinstance(named, Mapping)
        or not named
        or not all(isinstance(c, ConceptVector) for c in named.values())
    ):
        raise PlanError(
            f"{told(what)} cannot be tuned; right is a concept (or several by name), a map with concepts, a "
            "routing contrast or a causal screen"
        )
    wanted = None if layers is None else tuple(as_layers(layers, PlanError))
    of = {name: _vectors(concept, bridge, wanted) for name, concept in named.items()}
    first = next(iter(named.values()))
    _check_together(named, bridge)
    model = first if bridge is None else bridge
    made_of = {name: _made_of(concept, bridge) for name, concept in named.items()}
    lever_ = Vectors(
        vectors={name: vectors for name, (vectors, _) in of.items()},
        norms=first.norms if bridge is None else bridge.norms,
        shuffled={name: shuffled for name, (_, shuffled) in of.items()},
        architecture=model.architecture,
        weights_id=model.weights_id,
        model=model.model,
        revision=model.revision,
        scopes=tuple(scopes) or ("answer",),
        reverse=reverse,
        made_of=made_of,
        doses=tuple(doses) or DOSES,
    )
    sources = [
        {"kind": "concept", "name": name, "sha256": _sha256([vectors, *shuffled])}
        for name, (vectors, shuffled) in of.items()
    ]
    return lever_, sources


def by_use(lever: Experts, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> Experts:
    """Experts with how often each is used, for their controls: where it is not known, on a task's prompts."""
    if lever.rates is not None:
        return lever
    sites = [site for site in find_routers(model) if site.facts.reason is None]
    texts = tuple(prompt_alone(tokenizer, number, item.content) for number, item in enumerate(task))
    with instrument(model, tokenizer, sites) as tool:
        return replace(lever, rates=usage(tool, tool.batches(Reading(task.name, texts, tuple(task.groups)))))


Directions = dict[int, "Tensor"]


def _vectors(
    concept: ConceptVector, bridge: AffineMap | None, wanted: tuple[int, ...] | None
) -> tuple[Directions, list[Directions]]:
    """A concept's directions in the model that is steered, and those of its label-shuffled ones."""
    if bridge is None:
        layers = concept.layers if wanted is None else concept.chosen_layers(wanted)
        places = {layer: concept.layers.index(layer) for layer in layers}
        shuffled = [{layer: draw[place] for layer, place in places.items()} for draw in concept.shuffled]
        return {layer: concept.vectors[layer] for layer in layers}, shuffled
    check_source(bridge, concept)
    bridge = bridge.of_concept(concept)
    sources = {
        layer: bridge.layer_map(layer).source_layer for layer in mapped_layers(bridge, concept, wanted)
    }
    places = {layer: concept.layers.index(source) for layer, source in sources.items()}
    vectors = {layer: bridge.map_vector(layer, concept.vectors[source]) for layer, source in sources.items()}
    shuffled = [
        {layer: bridge.map_vector(layer, draw[place]) for layer, place in places.items()}
        for draw in concept.shuffled
    ]
    return vectors, shuffled


def _check_together(named: Mapping[str, ConceptVector], bridge: AffineMap | None) -> None:
    """Raise where concepts are of different models."""
    if bridge is not None:
        return
    first = next(iter(named.values()))
    for name, concept in named.items():
        if concept.architecture.id != first.architecture.id:
            raise ArchitectureMismatch(f"{name}: is of another architecture than the concepts before it")
        if concept.weights_id != first.weights_id:
            raise WeightsMismatch(f"{name}: is of other weights than the concepts before it")


def _made_of(concept: ConceptVector, bridge: AffineMap | None) -> dict[str, Any]:
    found: dict[str, Any] = {"concept": concept.provenance()}
    if bridge is not None:
        found["map"] = {"source": bridge.source.model, "from": [dict(source) for source in bridge.made_from]}
    return found


def _sha256(draws: Sequence[Directions]) -> str:
    """Of a concept's directions and its controls'."""
    digest = hashlib.sha256()
    for vectors in draws:
        for layer, vector in sorted(vectors.items()):
            digest.update(f"{layer}:".encode() + np.asarray(vector.float().cpu(), "<f4").tobytes())
    return digest.hexdigest()
