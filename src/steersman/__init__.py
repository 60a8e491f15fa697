"""Steersman steers large language models while they run: this is its public face, and defines nothing.

Names are imported when first used: `import steersman` and `steersman --help` need not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steersman.chats.setting import set_chat_format
    from steersman.concepts.affine_map import AffineMap
    from steersman.concepts.anchors import AnchorEncoder, anchor_map, encode_anchors
    from steersman.concepts.concept import ConceptVector
    from steersman.concepts.fitting import fit_affine_map
    from steersman.concepts.refinement import refine_concept
    from steersman.concepts.separation import Separation
    from steersman.concepts.solving import merge_affine_maps
    from steersman.concepts.transplant import transplant
    from steersman.concepts.transplant_check import LayerCheck, TransplantCheck, check_transplant
    from steersman.edits import ExpertEdit, ResidualEdit
    from steersman.errors import (
        ArchitectureMismatch,
        ArtifactError,
        JudgeError,
        ModelError,
        PairsError,
        PlanError,
        SteeringNotApplied,
        SteersmanError,
        WeightsMismatch,
    )
    from steersman.evaluation.evaluate import evaluate
    from steersman.evaluation.judges.opening import load_judge
    from steersman.evaluation.result import Evaluation
    from steersman.evaluation.screening.screen import screen_experts
    from steersman.evaluation.screening.sizes import sweep_sizes
    from steersman.evaluation.tasks.registry import load_task
    from steersman.evaluation.tuning.result import Tuning
    from steersman.evaluation.tuning.tuning import tune
    from steersman.experts.causal import CausalScreen
    from steersman.experts.contrast import RoutingContrast, merge_contrasts
    from steersman.experts.counting import detect_experts
    from steersman.experts.profile import ExpertProfile
    from steersman.experts.profiling import describe_experts
    from steersman.interop.ds4 import export_ds4
    from steersman.interop.easysteer import export_easysteer, import_easysteer
    from steersman.interop.gguf import export_gguf, import_gguf
    from steersman.interop.lm_eval import export_lm_eval
    from steersman.interop.repeng import import_repeng
    from steersman.interop.steering_vectors import import_steering_vectors
    from steersman.interop.steermoe import import_steermoe
    from steersman.limits import Router
    from steersman.models.apply import apply_rows
    from steersman.models.architecture import read_architecture
    from steersman.models.identity import weights_id
    from steersman.models.loading import load_model
    from steersman.models.receipt import Receipt
    from steersman.pairs import ContrastPair, ContrastPairs, load_pairs, persona_pairs
    from steersman.steering import Architecture, Steering, compose

_HOME = {
    "steersman.chats.setting": ("set_chat_format",),
    "steersman.concepts.affine_map": ("AffineMap",),
    "steersman.concepts.anchors": ("AnchorEncoder", "anchor_map", "encode_anchors"),
    "steersman.concepts.concept": ("ConceptVector",),
    "steersman.concepts.fitting": ("fit_affine_map",),
    "steersman.concepts.refinement": ("refine_concept",),
    "steersman.concepts.separation": ("Separation",),
    "steersman.concepts.transplant": ("transplant",),
    "steersman.concepts.transplant_check": ("LayerCheck", "TransplantCheck", "check_transplant"),
    "steersman.concepts.solving": ("merge_affine_maps",),
    "steersman.edits": ("ExpertEdit", "ResidualEdit"),
    "steersman.errors": (
        "ArchitectureMismatch",
        "ArtifactError",
        "JudgeError",
        "ModelError",
        "PairsError",
        "PlanError",
        "SteeringNotApplied",
        "SteersmanError",
        "WeightsMismatch",
    ),
    "steersman.evaluation.evaluate": ("evaluate",),
    "steersman.evaluation.judges.opening": ("load_judge",),
    "steersman.evaluation.tasks.registry": ("load_task",),
    "steersman.evaluation.result": ("Evaluation",),
    "steersman.evaluation.tuning.result": ("Tuning",),
    "steersman.evaluation.tuning.tuning": ("tune",),
    "steersman.evaluation.screening.screen": ("screen_experts",),
    "steersman.evaluation.screening.sizes": ("sweep_sizes",),
    "steersman.experts.causal": ("CausalScreen",),
    "steersman.experts.contrast": ("RoutingContrast", "merge_contrasts"),
    "steersman.experts.counting": ("detect_experts",),
    "steersman.experts.profile": ("ExpertProfile",),
    "steersman.experts.profiling": ("describe_experts",),
    "steersman.interop.ds4": ("export_ds4",),
    "steersman.interop.easysteer": ("export_easysteer", "import_easysteer"),
    "steersman.interop.gguf": ("export_gguf", "import_gguf"),
    "steersman.interop.lm_eval": ("export_lm_eval",),
    "steersman.interop.repeng": ("import_repeng",),
    "steersman.interop.steering_vectors": ("import_steering_vectors",),
    "steersman.interop.steermoe": ("import_steermoe",),
    "steersman.limits": ("Router",),
    "steersman.models.apply": ("apply_rows",),
    "steersman.models.architecture": ("read_architecture",),
    "steersman.models.identity": ("weights_id",),
    "steersman.models.loading": ("load_model",),
    "steersman.models.receipt": ("Receipt",),
    "steersman.pairs": ("ContrastPair", "ContrastPairs", "load_pairs", "persona_pairs"),
    "steersman.steering": ("Architecture", "Steering", "compose"),
}

__all__ = [
    "AffineMap",
    "AnchorEncoder",
    "Architecture",
    "ArchitectureMismatch",
    "ArtifactError",
    "CausalScreen",
    "ConceptVector",
    "ContrastPair",
    "ContrastPairs",
    "Evaluation",
    "ExpertEdit",
    "ExpertProfile",
    "JudgeError",
    "LayerCheck",
    "ModelError",
    "PairsError",
    "PlanError",
    "Receipt",
    "ResidualEdit",
    "Router",
    "RoutingContrast",
    "Separation",
    "Steering",
    "SteeringNotApplied",
    "SteersmanError",
    "TransplantCheck",
    "Tuning",
    "WeightsMismatch",
    "anchor_map",
    "apply_rows",
    "check_transplant",
    "compose",
    "describe_experts",
    "detect_experts",
    "encode_anchors",
    "evaluate",
    "export_ds4",
    "export_easysteer",
    "export_gguf",
    "export_lm_eval",
    "fit_affine_map",
    "import_easysteer",
    "import_gguf",
    "import_repeng",
    "import_steering_vectors",
    "import_steermoe",
    "load_judge",
    "load_model",
    "load_pairs",
    "load_task",
    "merge_affine_maps",
    "merge_contrasts",
    "persona_pairs",
    "read_architecture",
    "refine_concept",
    "screen_experts",
    "set_chat_format",
    "sweep_sizes",
    "transplant",
    "tune",
    "weights_id",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("steersman")
    for module, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module 'steersman' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
