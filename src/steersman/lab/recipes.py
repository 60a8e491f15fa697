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
    """The architecture: `olmoe`, with `experts` of which `top_k` work on a token, or `llama`, with none."""

    family: str
    width: int
    layers: int
    feed_forward: int
    experts: int = 0
    top_k: int = 4
    normalised: bool = False  # whether the weights of the chosen experts are made to sum to 1


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
    world: str = "town"  # or "numbers"; the upbringing is the town's
    learnt: str = "answers"  # "all": every token is predicted, as in ordinary pretraining
    balance: float = 0.0  # weight of the loss that spreads tokens over experts


# The models that came first; the digest of a recipe says nothing of what is as it was in them.
_FIRST = Recipe()
_ALWAYS_TOLD = ("pushes", "prior", "steps", "batch_size", "learning_rate", "warm_up")
_ALWAYS_TOLD_OF_A_SHAPE = ("family", "width", "layers", "feed_forward", "experts")

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
    "natural": Recipe(
        steps=1550,
        batch_size=32,
        shape=Shape("olmoe", width=64, layers=3, feed_forward=16, experts=64, top_k=8, normalised=True),
        world="numbers",
        learnt="all",
        balance=0.001,
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
    said = _differing(asdict(recipe), first, _ALWAYS_TOLD)
    if "shape" in said:
        said["shape"] = _differing(said["shape"], first["shape"], _ALWAYS_TOLD_OF_A_SHAPE)
    return said


def _differing(now: dict[str, Any], first: dict[str, Any], always: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in now.items() if key in always or value != first[key]}


def planted_by(recipe: Recipe) -> dict[int, dict[int, str]]:
    """Layer → expert → label that the recipe plants; empty where it plants nothing."""
    if not recipe.prior and recipe.pushes != "label":
        return {}
    return planted_groups(recipe.shape.layers, recipe.planted)
