"""How many experts the SteerMoE paper steers in each of its models, by name: what `select --preset` takes.

arXiv 2509.09660, the table of sizes; the same numbers are in the reference's `activations/num_experts.jsonl`
(github.com/adobe-research/SteerMoE). They were found by trying sizes on each model's own ranking, so a preset
is for one architecture: the same number is another share of another model's experts, and is refused there.
"""

from __future__ import annotations

from dataclasses import dataclass

from steersman.errors import PlanError
from steersman.steering import Architecture


@dataclass(frozen=True)
class Preset:
    """A published size: how many experts to activate and to deactivate, in a model of which form."""

    activate: int
    deactivate: int
    model_type: str
    layers: int
    experts: int
    top_k: int

    @property
    def form(self) -> str:
        """The architecture that the preset is for, in words."""
        return f"{self.model_type} with {self.layers} layers of {self.experts} experts, {self.top_k} a token"


_FORMS = {
    "qwen3-30b-a3b": ("qwen3_moe", 48, 128, 8),
    "gpt-oss-120b": ("gpt_oss", 36, 128, 4),
    "gpt-oss-20b": ("gpt_oss", 24, 32, 4),
    "mixtral-8x7b": ("mixtral", 32, 8, 2),
    "olmoe-1b-7b": ("olmoe", 16, 64, 8),
    "phi-3.5-moe": ("phimoe", 32, 16, 2),
}
_SIZES = {
    "qwen3-30b-a3b/faithful": (0, 500),
    "qwen3-30b-a3b/safe": (15, 0),
    "gpt-oss-120b/faithful": (5, 100),
    "gpt-oss-120b/safe": (5, 0),
    "gpt-oss-20b/faithful": (10, 50),
    "gpt-oss-20b/safe": (5, 0),
    "mixtral-8x7b/faithful": (10, 100),
    "mixtral-8x7b/safe": (20, 0),
    "olmoe-1b-7b/faithful": (0, 50),
    "olmoe-1b-7b/safe": (5, 0),
    "phi-3.5-moe/faithful": (10, 75),
    "phi-3.5-moe/safe": (5, 0),
}
PRESETS = {
    name: Preset(activate, deactivate, *_FORMS[name.partition("/")[0]])
    for name, (activate, deactivate) in _SIZES.items()
}
"""Name → preset: MODEL/faithful for pairs with and without a document, MODEL/safe for refusals."""


def preset_for(name: str, architecture: Architecture) -> Preset:
    """The preset of a name, for a contrast of this architecture.

    Raises:
        PlanError: no preset has the name, or it is for another architecture.
    """
    preset = PRESETS.get(name)
    if preset is None:
        raise PlanError(f"no preset is called {name!r}; known: {', '.join(PRESETS)}")
    routers = {(router.experts, router.top_k) for router in architecture.routers if router.steerable}
    found = (architecture.model_type, architecture.layer_count, routers)
    if found != (preset.model_type, preset.layers, {(preset.experts, preset.top_k)}):
        there = ", ".join(f"{experts} experts, {top_k} a token" for experts, top_k in sorted(routers))
        raise PlanError(
            f"the preset {name} is for {preset.form}; this is {architecture.model_type} with "
            f"{architecture.layer_count} layers of {there}: choose sizes for it instead"
        )
    return preset
