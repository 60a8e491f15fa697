"""The prompts of concepts among the texts of a map: half of their groups make it, the other half judge it.

A map that was fitted on texts without a concept need not carry it, so its own prompts, both sides, are texts
like others. But a map that has seen a prompt's states may know them by heart, and the gate of a
transplantation, which looks at the target's states of the pairs, would pass what carries nothing else. So
whole groups are kept apart: of the groups in the order of their hashes every second one goes into the fit,
floor(n/2) of n, and the rest stays out of it, to judge. Why half: the gate's power goes with the number of
groups that judge, what a map learns of a concept with those that do not, and nothing says which is scarcer.
Which groups the fit has seen, also among the texts, is kept in the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steersman.concepts.affine_map import refined
from steersman.concepts.concept import ConceptVector
from steersman.concepts.transplant_check import resolve_pairs
from steersman.models.encoding import hash_of_cluster
from steersman.pairs import ContrastPairs
from steersman.steering import sha256_of
from steersman.texts import Text, Texts

HINT = "refine it again from pairs that can be read, or leave its prompts out (--without-prompts)"


def with_prompts(
    texts: Texts, concepts: Sequence[ConceptVector], *, prompts: bool
) -> tuple[Texts, list[dict[str, Any]]]:
    """The texts, and after them the prompts of concepts, each once.

    Args:
        texts: Of the map.
        concepts: Of its source.
        prompts: Whether they are to be added.

    Returns:
        All of them; and of each concept which it is, and `fitted`, hashes of the groups that the fit sees.

    Raises:
        PairsError: a concept's pairs cannot be had.
    """
    seen = {sha256_of(text.content) for text in texts} if concepts else set()
    of_texts = frozenset(seen)
    more: list[Text] = []
    facts: list[dict[str, Any]] = []
    for concept in concepts:
        entry: dict[str, Any] = {"kind": "concept", "name": concept.model, "refined": refined(concept)}
        if prompts:
            pairs = resolve_pairs(concept, None, HINT)
            fitted = fitted_groups(pairs)
            for pair in pairs:
                group = hash_of_cluster(pair.cluster)
                sides = {sha256_of(side): side for side in (pair.positive, pair.negative)}
                if group in fitted:
                    more += [
                        Text(side, pair.where, pair.cluster) for key, side in sides.items() if key not in seen
                    ]
                    seen.update(sides)
                elif of_texts & sides.keys():
                    fitted.add(group)
            entry["fitted"] = sorted(fitted)
        facts.append(entry)
    return (Texts([*texts, *more], texts.name) if more else texts), facts


def fitted_groups(pairs: ContrastPairs) -> set[int]:
    """The hashes of the groups whose prompts go into a fit."""
    return set(sorted({hash_of_cluster(pair.cluster) for pair in pairs})[1::2])
