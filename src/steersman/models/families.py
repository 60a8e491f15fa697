"""The facts in which MoE families differ: one row a router class. Everything else is found by structure.

A row says how the router chooses: what becomes of its raw scores before the top-k (`scoring`), whether
mixture weights are renormalised, which tensor is added to the scores for selection only
(`correction_bias`), and where a choice can be read. Names are attributes, with dots for those of a child.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Choice = Literal["experts", "skipping", "dense", "sorted"]


@dataclass(frozen=True)
class Family:
    """How one router class chooses experts.

    `scoring` is the routing rule up to its flags, with attributes of the router in braces; `renormalised` is
    True, False, or the name of the router's own flag; `correction_bias` names the tensor added for selection,
    of the router or of the block around it (which then gives it as an argument), and `biased` the router's
    flag for using it; `keeps_topk` says that selection goes through `torch.topk` over the experts
    (sparsemixer takes the argmax twice instead).

    `experts` and `top_k` name E and k where they are not `num_experts` and `top_k`: E counts every class that
    can be chosen. `choice` is where the chosen ids are read: given to the `experts` module; the same, but
    class E - 1 runs nothing and reaches it as expert 0 of weight 0 (`skipping`); the scores that are left
    (`dense`); or slots sorted by expert (`sorted`). `refused` is why no router of the class can be steered.
    """

    scoring: str
    renormalised: bool | str = False
    correction_bias: str | None = None
    group_score: str | None = None
    keeps_topk: bool = True
    biased: str | None = None
    experts: str = "num_experts"
    top_k: str = "top_k"
    choice: Choice = "experts"
    refused: str | None = None


def _each(family: Family, *names: str) -> dict[str, Family]:
    return dict.fromkeys(names, family)


_BIAS = "e_score_correction_bias"
_BLOCK_BIAS = "expert_bias"

ROUTERS: dict[str, Family] = {
    **_each(
        Family("softmax-topk", renormalised="norm_topk_prob"),
        "FlexOlmoTopKRouter",
        "LaraMiniTopKRouter",
        "MellumTopKRouter",
        "OlmoeTopKRouter",
        "Qwen2MoeTopKRouter",
        "Qwen3MoeTopKRouter",
        "Qwen3NextTopKRouter",
        "Qwen3OmniMoeTalkerTextTopKRouter",
        "Qwen3OmniMoeThinkerTextTopKRouter",
        "Qwen4ExpTextTopKRouter",
    ),
    **_each(
        Family("softmax-topk", renormalised=True),
        "HunYuanMoEV1Gate",
        "MiniMaxTopKRouter",
        "MixtralTopKRouter",
        "Qwen3OmniMoeTextTopKRouter",
        "Qwen3VLMoeTextTopKRouter",
        "Qwen3_5MoeTopKRouter",
    ),
    **_each(
        Family("softmax-topk", renormalised=True, top_k="config.top_k_experts"),
        "DiffusionGemmaTextRouter",
        "Gemma4TextRouter",
    ),
    "JambaTopKRouter": Family("softmax-topk"),
    "JambaSparseMoeBlock": Family("softmax-topk"),  # before transformers 5.21 the block itself chooses
    "DbrxFFN": Family("softmax-topk", renormalised="moe_normalize_expert_weights"),
    **_each(
        Family("topk-softmax"),
        "AriaTextTopKRouter",
        "GptOssTopKRouter",
        "GraniteMoeHybridTopKRouter",
        "GraniteMoeSWATopKRouter",
        "GraniteMoeSharedTopKRouter",
        "GraniteMoeTopKRouter",
    ),
    "JetMoeTopKGating": Family("topk-softmax", choice="sorted"),
    "Cohere2MoeTopKRouter": Family("topk-{expert_selection_fn}", renormalised="norm_topk_prob"),
    "Llama4Router": Family("topk-sigmoid", choice="dense"),
    "FlintTopKRouter": Family("sigmoid-topk", renormalised="norm_topk_prob"),
    **_each(
        Family("sigmoid-topk", renormalised=True, correction_bias=_BIAS),
        "HYV3TopKRouter",
        "LagunaTopKRouter",
        "MiniMaxM2TopKRouter",
        "MiniMaxM3VLTopKRouter",
        "MuseSparkTopkRouter",
        "Step3p7TopKRouter",
    ),
    **_each(
        Family("{score_fn}-topk", renormalised=True, correction_bias=_BIAS),
        "DeepseekV4TopKRouter",
        "Inkling2LoopTopKRouter",
        "Inkling2TopKRouter",
    ),
    "AfmoeTokenChoiceRouter": Family("sigmoid-topk", renormalised=True, correction_bias=_BLOCK_BIAS),
    "Lfm2MoeTopKRouter": Family(
        "sigmoid-topk", renormalised="norm_topk_prob", correction_bias=_BLOCK_BIAS, biased="use_expert_bias"
    ),
    "InklingTopkRouter": Family("sigmoid-topk-with-shared", renormalised=True, correction_bias=_BIAS),
    "Kolibri1TopKRouter": Family("topk-sigmoid", renormalised="norm_topk_prob", correction_bias=_BIAS),
    **_each(
        Family("softmax-topk", renormalised=True, correction_bias=f"moe_statics.{_BIAS}"),
        "Ernie4_5_MoeTopKRouter",
        "Ernie4_5_VLMoeMoeTopKRouter",
    ),
    "LongcatFlashTopkRouter": Family("softmax-topk", correction_bias=_BIAS, experts="n_routed_experts"),
    "ZayaRouter": Family(
        "softmax-topk", correction_bias="balancing_biases", experts="num_router_classes", choice="skipping"
    ),
    **_each(
        Family("sigmoid-topk", renormalised="norm_topk_prob", correction_bias=_BIAS, group_score="top2"),
        "AXK1TopkRouter",
        "AXK2TopkRouter",
        "BailingHybridTopkRouter",
        "BeamTopKRouter",
        "DeepseekV32TopkRouter",
        "DeepseekV3TopkRouter",
        "Dots1TopkRouter",
        "Dots3NoteTextTopkRouter",
        "ExaoneMoeTopkRouter",
        "Glm4MoeLiteTopkRouter",
        "Glm4MoeTopkRouter",
        "Glm4vMoeTextTopkRouter",
        "Glm5NextTextTopkRouter",
        "GlmMoeDsaTopkRouter",
        "HYV4TopkRouter",
        "HYV4VLTopkRouter",
        "KimiLinearTopkRouter",
        "MiMoV2FlashTopkRouter",
        "NemotronHTopkRouter",
        "SolarOpenTopkRouter",
    ),
    **_each(
        Family("softmax-topk", group_score="max"),
        "DeepseekOcr2TextTopkRouter",
        "DeepseekV2TopkRouter",
        "UnlimitedOcrTextTopkRouter",
    ),
    "Mistral4TopkRouter": Family("softmax-topk", renormalised="norm_topk_prob", group_score="top2"),
    "MistralLarge4TextTopkRouter": Family("softmax-topk", renormalised=True, group_score="top2"),
    "PhimoeTopKRouter": Family("sparsemixer", keeps_topk=False),
    "DeepseekV4HashRouter": Family("hash", refused="its experts come from token ids, not from scores"),
    "DogeCDMoE": Family(
        "product-keys",
        refused="its experts are retrieved by two product keys: they have no scores of their own",
    ),
}
"""By the name of the router's class, or of the block's where the block itself chooses."""


_LOOPS: dict[str, Callable[[Any], range]] = {
    "loop_num_passes": lambda c: range(c.loop_layer_index_start, c.loop_layer_index_end),  # Inkling 2 Loop
    "n_recurrent_loops": lambda c: range(c.n_input_layers, c.n_input_layers + c.n_recurrent_layers),  # Dory
}
"""The layers that a forward runs several times, by what a configuration calls how often."""


def why_looped(config: object, layer: int) -> str | None:
    """Why a decoder layer that one forward runs several times is not steered; None where it runs once."""
    for name, layers in _LOOPS.items():
        passes = int(getattr(config, name, None) or 1)
        if passes > 1 and layer in layers(config):
            return f"it runs {passes} times in one forward, and a plan names layers, not passes"
    return None


def family_of(router: nn.Module) -> Family | None:
    """The row of a router module, found by its class or one it derives from; None where the family is not
    known.
    """
    for cls in type(router).__mro__:
        if cls.__name__ in ROUTERS:
            return ROUTERS[cls.__name__]
    return None


def rule_of(router: nn.Module, family: Family, groups: tuple[int, int] | None) -> str:
    """The routing rule in words, with the flags of this router: it enters the architecture id."""
    parts = [re.sub(r"{(\w+)}", lambda name: _named(getattr(router, name[1])), family.scoring)]
    flag = family.renormalised
    if getattr(router, flag, False) if isinstance(flag, str) else flag:
        parts.append("renormalised")
    if has_bias(router, family):
        parts.append("bias")
    if groups is not None:
        parts.append(f"groups-{family.group_score}")
    return "+".join(parts)


def has_bias(router: nn.Module, family: Family) -> bool:
    """Whether a router adds a bias to its scores for selection."""
    if family.correction_bias is None:
        return False
    return family.biased is None or bool(getattr(router, family.biased, False))


def attribute(module: nn.Module, path: str) -> object:
    """What a dotted name means to a module; None where it has no such attribute."""
    try:
        return operator.attrgetter(path)(module)
    except AttributeError:
        return None


def _named(function: object) -> str:
    """The name of a scoring function, given by its name or as an activation module."""
    if isinstance(function, str):
        return function
    return type(function).__name__.lower().removesuffix("activation")
