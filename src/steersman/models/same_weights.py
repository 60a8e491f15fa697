"""Whether two artifacts, or the two models that they name, have the same weights."""

from __future__ import annotations

from typing import Protocol, TypeVar

from steersman.errors import ModelError, WeightsMismatch
from steersman.models.weights_ids import is_by_sample


class Named(Protocol):
    """What belongs to one model, and says which."""

    @property
    def weights_id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...


Either = TypeVar("Either", bound=Named)


def same_weights(one: Named, other: Named) -> bool:
    """Whether two artifacts are of the same weights.

    Where one names them by a sample, as earlier versions did, and the other by every byte, only the model can
    tell: the one that either names is looked up, in a folder, in the Hub's cache or in the lab.

    Raises:
        WeightsMismatch: that model is not at hand.
    """
    if is_by_sample(one.weights_id) == is_by_sample(other.weights_id):
        return one.weights_id == other.weights_id
    from steersman.models.identity import has_weights
    from steersman.models.loading import load_local_structure

    for named in (one, other):
        try:
            model = load_local_structure(named.model, revision=named.revision)
        except ModelError:
            continue
        newer, older = sorted((one, other), key=lambda each: is_by_sample(each.weights_id))
        if has_weights(model, newer.weights_id):
            return has_weights(model, older.weights_id, "one of them")
    raise WeightsMismatch(
        "one of them names its weights by a sample of their bytes, as earlier versions did, and the other by "
        f"all; their model ({one.model or other.model or 'without a name'}) is not at hand to tell whether "
        "they are the same: make the older one again"
    )


def with_stronger_id(one: Either, other: Either) -> Either:
    """Of two artifacts of the same weights the one whose id is over every byte, if there is one."""
    return other if is_by_sample(one.weights_id) else one
