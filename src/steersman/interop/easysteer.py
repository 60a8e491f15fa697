"""EasySteer's files (github.com/ZJU-REAL/EasySteer): expert plans (algorithm `moe_router`), JSON, both ways;
its GGUF vectors go on to `easysteer_vectors`.

    {"layer_configs": {"7": {"mode": "deactivate", "expert_ids": [30, 25]},
                       "9": {"mode": "activate", "activate_ids": [12], "deactivate_ids": [35]}}}

`expert_ids` go the way of `mode` (without one: `activate`; older files say `boost`, `soft_hard`, `suppress`,
`steermoe`); `activate_ids` and `deactivate_ids` go their own way in either mode. The engine sets log-softmax
scores to their maximum + epsilon or minimum - epsilon before the top-k, with epsilon 0.01: SteerMoE's rule,
which is ours at full strength where scores are chosen by after a softmax and nothing else. Its soft modes
move scores by other rules than ours, or by chance, so they are refused. A file does not say which tokens are
steered (the request does, by `apply`): scope is `all` unless the importer says otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from steersman.edits import ExpertEdit, Scope, residual_edits
from steersman.errors import ArtifactError, PlanError, valid_name
from steersman.interop.easysteer_vectors import parse_vectors
from steersman.interop.foreign_files import read_bytes, read_json, write_bytes
from steersman.interop.foreign_vectors import check_scope, steering_of
from steersman.limits import Router
from steersman.models.architecture import read_architecture
from steersman.models.gguf_header import MAGIC
from steersman.models.identity import model_name, weights_id
from steersman.models.loading import Named, structure_of
from steersman.steering import Steering

SAME_RULES = ("softmax-topk", "softmax-topk+renormalised", "topk-softmax")
"""Routing rules for which a log-softmax of the raw scores changes neither choice nor mixture weights."""

_ACTIVATE = {"activate", "boost", "soft_hard", "steermoe"}
_DEACTIVATE = {"deactivate", "suppress"}
_SOFT = {"soft", "soft_topk", "soft_random"}
_LISTS = ("expert_ids", "activate_ids", "deactivate_ids")
_EPSILON = 0.01


def import_easysteer(source: str | Path, model: Named, *, scope: Scope = "all") -> Steering:
    """Read an EasySteer expert plan, or its GGUF vectors, as a steering of `model`; vectors at strength 1
    (EasySteer's `scale`).

    Args:
        source: The JSON file, or the GGUF file.
        model: The model (or its name) that the plan is for: layers and experts are checked against it.
        scope: Which tokens to steer: `all`, as EasySteer's own examples do, `prompt`, `generated` or
            `answer`.

    Raises:
        ArtifactError: the file is damaged or foreign, or says what a steering cannot say exactly.
        PlanError: the plan breaks a limit of the model's routers, or has vectors of layers that the model
            lacks, or of another width.

    Example:
        >>> plan = steersman.Steering.from_experts("lab:moe", {3: [5]})
        >>> steersman.export_easysteer(plan, "plan.json")
        >>> steersman.import_easysteer("plan.json", "lab:moe") == plan
        True
    """
    model = structure_of(model)
    path = Path(valid_name(source, ArtifactError))
    if (content := read_bytes(path)).startswith(MAGIC):
        found = parse_vectors(content, path)
        return steering_of(
            found.directions,
            model,
            scope=scope,
            path=path,
            kind="easysteer",
            content=content,
            said=found.said,
        )
    strengths = read_plan(path)
    architecture = read_architecture(model)
    name, revision = model_name(model)
    try:
        for layer in strengths:
            _check_rule(architecture.router(layer))
        return Steering(
            edits=(ExpertEdit(strengths, scope),),
            architecture=architecture,
            weights_id=weights_id(model),
            model=name,
            revision=revision,
            provenance={
                "made": "imported",
                "from": [
                    {
                        "kind": "easysteer",
                        "name": path.name,
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
                ],
            },
        )
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def read_easysteer(path: Path) -> object:
    """What an EasySteer file holds, whichever of the two. Raises `ArtifactError` as the import does."""
    content = read_bytes(path)
    return parse_vectors(content, path) if content.startswith(MAGIC) else read_plan(path)


def read_plan(path: Path) -> dict[int, dict[int, float]]:
    """{layer: {expert: ±1}} of an EasySteer file. Raises `ArtifactError` as `import_easysteer` does."""
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("layer_configs"), dict):
        raise ArtifactError(f'{path}: not an EasySteer plan: {{"layer_configs": {{"7": {{…}}}}}} is expected')
    unknown = sorted(value.keys() - {"layer_configs"})
    if unknown:
        raise ArtifactError(f"{path}: unknown key {unknown[0]!r} beside layer_configs")
    if not value["layer_configs"]:
        raise ArtifactError(f"{path}: layer_configs is empty: there is nothing to steer")
    strengths: dict[int, dict[int, float]] = {}
    for key, config in value["layer_configs"].items():
        if not (key.isascii() and key.isdigit() and len(key) < 7):
            raise ArtifactError(f"{path}: layer {key[:40]!r} is no layer's number")
        if int(key) in strengths:
            raise ArtifactError(f"{path}: layer {int(key)} is given twice")
        strengths[int(key)] = _strengths_of_layer(f"{path}: layer {int(key)}", config)
    return strengths


def _strengths_of_layer(where: str, config: Any) -> dict[int, float]:
    if not isinstance(config, dict):
        raise ArtifactError(f"{where}: not an object")
    mode = config.get("mode", "activate")
    if isinstance(mode, str) and mode in _SOFT:
        raise ArtifactError(f"{where}: mode {mode!r} moves scores by a rule that a steering does not have")
    if not isinstance(mode, str) or mode not in _ACTIVATE | _DEACTIVATE:
        raise ArtifactError(f"{where}: mode {str(mode)[:40]!r} is unknown: use 'activate' or 'deactivate'")
    unknown = sorted(config.keys() - {"mode", "epsilon", *_LISTS})
    if unknown:
        raise ArtifactError(f"{where}: key {unknown[0][:40]!r} cannot be expressed in a steering")
    if config.get("epsilon", _EPSILON) != _EPSILON:
        raise ArtifactError(f"{where}: epsilon is not {_EPSILON}, which is the only one a steering has")
    strengths: dict[int, float] = {}
    for name in _LISTS:
        sign = -1.0 if name == "deactivate_ids" or (name == "expert_ids" and mode in _DEACTIVATE) else 1.0
        for expert in _ids(where, name, config.get(name, [])):
            if strengths.setdefault(expert, sign) != sign:
                raise ArtifactError(f"{where}: expert {expert} is both activated and deactivated")
    if not strengths:
        raise ArtifactError(f"{where}: names no experts ({', '.join(_LISTS)})")
    return strengths


def _ids(where: str, name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(expert) is int and expert >= 0 for expert in value):
        raise ArtifactError(f"{where}: {name} is not a list of experts' numbers")
    return value


def export_easysteer(steering: Steering, target: str | Path, *, force: bool = False) -> None:
    """Write a steering as an EasySteer expert plan, to be applied to all tokens
    (`ApplySpec(prompt="all", generation="all")`).

    Args:
        steering: The plan.
        target: The JSON file to write.
        force: Replace a file that is there.

    Raises:
        ArtifactError: the plan has what the format cannot say exactly (soft strengths, another scope than
            `all`, a routing rule other than a softmax), or the file cannot be written.

    Example:
        >>> plan = steersman.Steering.from_experts("lab:moe", {3: [5]})
        >>> steersman.export_easysteer(plan, "plan.json")
    """
    configs = {
        str(layer): _config(experts) for layer, experts in full_strengths(steering, "EasySteer's format")
    }
    for layer in configs:
        _check_rule(steering.architecture.router(int(layer)))
    if not configs:
        raise ArtifactError("the steering changes nothing, and EasySteer takes no empty plan")
    content = json.dumps({"layer_configs": configs}, indent=2) + "\n"
    write_bytes(target, content.encode(), force=force)


def _config(experts: Mapping[int, float]) -> dict[str, Any]:
    activated = [expert for expert, strength in experts.items() if strength > 0]
    deactivated = [expert for expert, strength in experts.items() if strength < 0]
    if activated and deactivated:
        return {"mode": "activate", "activate_ids": activated, "deactivate_ids": deactivated}
    if activated:
        return {"mode": "activate", "expert_ids": activated}
    return {"mode": "deactivate", "expert_ids": deactivated}


def full_strengths(steering: Steering, what: str) -> Iterator[tuple[int, dict[int, float]]]:
    """(layer, {expert: ±1}) of a plan for formats that know in and out only; experts at 0 change nothing.

    Raises `ArtifactError` where a strength is soft, a scope is not `all`, or there are vectors.
    """
    if residual_edits(steering.edits):
        raise ArtifactError(f"{what} holds experts alone: the steering has vectors too")
    for edit in steering.edits:
        check_scope(edit, what)
    for layer, experts in steering.strengths.items():
        for expert, strength in experts.items():
            if abs(strength) not in (0.0, 1.0):
                raise ArtifactError(
                    f"{what} knows experts in or out only: expert {expert} of layer {layer} has the "
                    f"strength {strength:g}, not 1 or -1"
                )
        named = {expert: strength for expert, strength in experts.items() if strength}
        if named:
            yield layer, named


def _check_rule(router: Router) -> None:
    if router.rule not in SAME_RULES:
        raise ArtifactError(
            f"layer {router.layer} routes by {router.rule}: EasySteer edits scores after a log-softmax, "
            "which is another plan there"
        )
