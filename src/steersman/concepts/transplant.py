"""Transplantation: v_t = W v_s (for a difference of states b cancels), as a plan for the target, if the gate
lets it through (ConTrans, arXiv 2405.13578, section 3.3; the gate is ours).

The gate: in the target, held-out pairs must lie apart along W v, beyond what the same pairs with other labels
bring, and adding it must make its own side likelier, where that can be asked (`transplant_check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from steersman.certainty import SIGNIFICANT, p_value
from steersman.chat_record import in_provenance
from steersman.concepts.affine_map import AffineMap
from steersman.concepts.concept import ConceptVector
from steersman.concepts.dose import DEFAULT_DOSE, Strength, defaults_of, doses, residual_edits
from steersman.concepts.transplant_check import (
    LayerCheck,
    Pairs,
    Target,
    TransplantCheck,
    check_source,
    check_transplant,
    mapped_layers,
    why_untold,
)
from steersman.edits import Scope
from steersman.errors import PlanError
from steersman.steering import Steering


def transplant(
    bridge: AffineMap,
    concept: ConceptVector,
    strength: float | str | None = None,
    *,
    layers: int | Sequence[int] | Literal["all"] | None = None,
    target: Target | None = None,
    pairs: Pairs | None = None,
    force: bool = False,
    scope: Scope = "answer",
    batch_size: int = 16,
    truncate: bool = False,
    progress: bool = False,
) -> Steering:
    """A plan that adds a concept of the map's source to the map's target.

    Args:
        bridge: The map.
        concept: A concept of its source.
        strength: A factor of W v, or a dose: strength · ‖W v‖ as a share of the median norm of the target's
            states. Ridge shrinks W v, so doses compare where factors do not. By default `"dose:0.3"`.
        layers: Target layers; by default of those that pass best the one nearest to two thirds of the depth
            (`TransplantCheck.best`). `"all"` only when said. What works, `tune` finds.
        target: As for `check_transplant`.
        pairs: As for `check_transplant`.
        force: Make the plan also where the gate refuses it; that is kept in its provenance. With layers
            named, and neither target nor pairs given, the gate is not asked at all.
        scope: Which tokens.
        batch_size: Texts in one forward.
        truncate: Leave out pairs that are too long for the target, when the gate is asked.
        progress: Show a progress bar on stderr where it takes more than a second.

    Raises:
        PlanError: the gate refuses it; a layer that concept or map lacks; a strength that is no number.
        WeightsMismatch, ArchitectureMismatch: a concept of another model, or another target.
        ModelError, PairsError: target or pairs cannot be had.

    Example:
        >>> pairs = steersman.load_pairs("lab:refusal/train")[:24]
        >>> concept = steersman.refine_concept("lab:source", None, pairs)
        >>> texts = [f"please give me the {thing}" for thing in ("badge", "key", "book")] * 20
        >>> bridge = steersman.fit_affine_map("lab:source", "lab:target", texts)
        >>> steersman.transplant(bridge, concept, "dose:0.3", layers=2, force=True)
        <Steering: vectors (add × ...) at layer 2; scope answer; for lab:target, ...>
    """
    dial = Strength.parse(DEFAULT_DOSE if strength is None else strength)
    if not dial.value:
        raise PlanError("strength 0 adds nothing; right is a number other than 0, or a dose such as dose:0.3")
    check_source(bridge, concept)
    bridge = bridge.of_concept(concept)
    named = None if layers is None else mapped_layers(bridge, concept, layers)
    asked = not (force and named is not None and target is None and pairs is None)
    check = None
    if asked:
        check = check_transplant(
            bridge,
            concept,
            target,
            pairs,
            layers=named,
            strength=strength,
            batch_size=batch_size,
            truncate=truncate,
            progress=progress,
        )
    plan = plan_of(bridge, concept, dial, named, check, force=force, scope=scope)
    return replace(plan, provenance={**plan.provenance, **defaults_of(layers, strength)})


def plan_of(
    bridge: AffineMap,
    concept: ConceptVector,
    strength: Strength,
    layers: Sequence[int] | None,
    check: TransplantCheck | None,
    *,
    force: bool = False,
    scope: Scope = "answer",
) -> Steering:
    """The plan, from what was found out before; None where the gate was not asked, which needs `force`."""
    bridge = bridge.of_concept(concept)
    if check is None:
        if not force or layers is None:
            raise PlanError("a plan without a check needs layers, and force")
        chosen = tuple(layers)
    else:
        chosen = tuple(layers) if layers is not None else (check.best_layer,)
        refused = [check.layers[layer] for layer in chosen if not check.layers[layer].passed]
        if refused and not force:
            raise PlanError(why_refused(refused[0], check))
    vectors = {
        layer: bridge.map_vector(layer, concept.vectors[bridge.layer_map(layer).source_layer])
        for layer in chosen
    }
    edits = residual_edits(vectors, strength, bridge.norms, scope, "add")
    return Steering(
        edits=edits,
        architecture=bridge.architecture,
        weights_id=bridge.weights_id,
        model=bridge.model,
        revision=bridge.revision,
        provenance={
            "made": "transplant",
            "strength": str(strength),
            "doses": doses(edits, bridge.norms),
            "concept": concept.provenance(),
            "map": _map_in_provenance(bridge, chosen),
            "gate": _gate_in_provenance(check, chosen),
        },
    )


def why_refused(found: LayerCheck, check: TransplantCheck) -> str:
    """Why the gate does not let a layer through, in one line."""
    name = check.pairs["name"]
    if found.separation is None:
        return (
            f"{name}: not transplanted: its pairs are of one group, or none are held out of the concept; "
            "give pairs of other groups, or force it"
        )
    if found.arrival is None:
        return f"{name}: not transplanted: {why_untold(check.clusters)}, or force it"
    if found.map_p > SIGNIFICANT:
        return (
            f"not transplanted: the map to layer {found.layer} of the target explains no more of held-out "
            f"texts than one of rows paired between texts (p = {p_value(found.map_p)}); give it more texts, "
            "or force it"
        )
    if found.arrives and found.probe is None:
        return f"not transplanted: layer {found.layer} of the target was not probed: {found.unprobed}"
    if found.arrives and found.probe is not None:
        return (
            f"not transplanted: at layer {found.layer} of the target held-out pairs lie apart along the "
            "mapped concept, but adding it does not raise the log-odds of its own side more than "
            f"relabelled ones do (p = {p_value(found.probe.p)}); force it to try"
        )
    return (
        f"not transplanted: at layer {found.layer} of the target held-out pairs lie no further apart along "
        f"the mapped concept than along concepts of the same pairs with other labels (p = "
        f"{p_value(found.arrival.p)}): the map may carry everything but the concept; force it to try"
    )


def _map_in_provenance(bridge: AffineMap, layers: Sequence[int]) -> dict[str, Any]:
    return {
        "source": bridge.source.model,
        "layers": {
            str(layer): {
                "source_layer": bridge.maps[layer].source_layer,
                "r2": float(bridge.maps[layer].r2),
                "r2_control": float(bridge.maps[layer].r2_control),
            }
            for layer in layers
        },
        **in_provenance(bridge.target.chat),
        "from": [dict(source) for source in bridge.made_from],
    }


def _gate_in_provenance(check: TransplantCheck | None, layers: Sequence[int]) -> dict[str, Any]:
    if check is None:
        return {"asked": False, "passed": False, "forced": True}
    passed = all(check.layers[layer].passed for layer in layers)
    return {
        "asked": True,
        "passed": passed,
        "forced": not passed,
        "pairs": dict(check.pairs),
        "layers": [check.layers[layer].to_json() for layer in layers],
    }
