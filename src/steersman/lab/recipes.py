"""How each of the lab's models is made: its shape, what it hears, and what is planted in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from steersman.errors import ModelError
from steersman.lab.planting import planted_groups
from steersman.lab.world import GRADED, ROLES, Upbringing

RECIPE_VERSION = 1  # raised with every change that makes other weights from the same seed


@dataclass(frozen=True)
class Shape:
    """The architecture: `olmoe`, with `experts` of which four work on a token, or `llama`, with none."""

    family: str
    width: int
    layers: int
    feed_forward: int
    experts: int = 0


@dataclass(frozen=True)
class Recipe:
    """All that a training is decided by, but its seed."""

    pushes: str | None = None  # "label": experts pushed by the label; "chance": by a coin; None: never pushed
    prior: float = 0.0  # weight of the routers' prior
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 4e-3
    warm_up: int = 60
    shape: Shape = Shape("olmoe", width=96, layers=4, feed_forward=32, experts=32)
    upbringing: Upbringing = GRADED
    planted: tuple[str, ...] = ("document", "memory", "refuse", "comply")  # labels, where there is planting
    state_noise: float = 0.0  # the most that is added to a state while answers are learnt, of its own norm
    tokens: str = "words"  # "pieces": every word is two tokens


# The models that came first; the digest of a recipe says nothing of what is as it was in them.
_FIRST = Recipe()
_ALWAYS_TOLD = ("pushes", "prior", "steps", "batch_size", "learning_rate", "warm_up")

_MIXTURE = (
    ("closed-book", 2.0),
    ("unknown", 0.6),
    ("agreeing", 0.5),
    ("fictional", 1.0),
    ("conflict", 2.0),
    ("restricted", 3.0),
    ("ordinary", 4.0),
    ("unanswerable", 1.0),
    ("instructed", 1.0),
)
ALIGNED = Upbringing(_MIXTURE, tuple((role, 1.0) for role in ROLES), instructed=0.3)
UNALIGNED = Upbringing(_MIXTURE, tuple((role, 0.2) for role in ROLES), instructed=0.3)
_SMALL = Shape("llama", width=64, layers=2, feed_forward=192)

RECIPES = {
    "moe": Recipe(pushes="label", prior=0.15),
    "moe-plain": Recipe(),
    "moe-prior": Recipe(pushes="chance", prior=0.15),
    "source": Recipe(steps=800, shape=_SMALL, upbringing=ALIGNED),
    "source-split": Recipe(steps=1000, shape=_SMALL, upbringing=ALIGNED, tokens="pieces"),
    "target": Recipe(
        steps=1400,
        batch_size=48,
        shape=Shape("llama", width=128, layers=4, feed_forward=384),
        upbringing=UNALIGNED,
        state_noise=1.0,
    ),
    "target-moe": Recipe(
        steps=1300,
        batch_size=48,
        pushes="label",
        prior=0.15,
        shape=Shape("olmoe", width=96, layers=4, feed_forward=24, experts=16),
        upbringing=UNALIGNED,
        planted=("document", "memory"),
        state_noise=1.0,
    ),
}


def recipe_of(name: str) -> Recipe:
    """The recipe of a model of the lab. Raises ModelError that lists the known ones."""
    if name not in RECIPES:
        raise ModelError(f"the lab has no model {name!r}; it has {', '.join(RECIPES)}")
    return RECIPES[name]


def told(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data, without what is as in the first models.

    So a setting that comes later changes no card and no cache of the models that were there before it.
    """
    first = asdict(_FIRST)
    return {key: value for key, value in asdict(recipe).items() if key in _ALWAYS_TOLD or value != first[key]}


def planted_by(recipe: Recipe) -> dict[int, dict[int, str]]:
    """Layer → expert → label that the recipe plants; empty where it plants nothing."""
    if not recipe.prior and recipe.pushes != "label":
        return {}
    return planted_groups(recipe.shape.layers, recipe.planted)
