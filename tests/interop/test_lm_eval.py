"""lm-eval's vectors: the exact content, by its own loading, and by its hooks made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from families import VOCABULARY, WIDTH, dense, shared
from steersman import ResidualEdit, Steering, export_lm_eval
from steersman.errors import ArchitectureMismatch, ArtifactError
from steersman.interop.lm_eval import hook_points
from steersman.steering import ExpertEdit

KEYS = {"action", "steering_vector", "steering_coefficient", "bias", "head_index"}


def vectors(*layers: int) -> dict[int, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {layer: torch.randn(WIDTH, generator=draws) for layer in layers}


def plan(model: nn.Module, *edits: Any) -> Steering:
    base = Steering.from_vectors(model, vectors(1), scope="all")
    return Steering(edits, base.architecture, base.weights_id)


def test_the_exact_content(tmp_path: Path) -> None:
    model, given = dense(), vectors(0, 2)
    steering = plan(model, ResidualEdit(given, 1.5, "all"), ResidualEdit(vectors(1), 1, "all", "project"))
    export_lm_eval(steering, tmp_path / "v.pt", model)
    content = torch.load(tmp_path / "v.pt", weights_only=True)
    assert list(content) == ["layers.0", "layers.1", "layers.2"]
    assert all(
        entry.keys() == KEYS and entry["bias"] is entry["head_index"] is None for entry in content.values()
    )
    assert [entry["action"] for entry in content.values()] == ["add", "clamp", "add"]
    assert [entry["steering_coefficient"] for entry in content.values()] == [1.0, 0.0, 1.0]
    assert torch.equal(content["layers.0"]["steering_vector"], given[0] * 1.5)
    assert torch.equal(content["layers.1"]["steering_vector"], vectors(1)[1])
    assert content["layers.0"]["steering_vector"].untyped_storage().nbytes() == 4 * WIDTH


def test_its_hooks_do_what_the_plan_does(tmp_path: Path) -> None:
    """The rules of `add` and `clamp` by hand, at the modules that the hook points name below base_model."""
    model = dense()
    steering = plan(
        model, ResidualEdit(vectors(0), -0.7, "all"), ResidualEdit(vectors(1), 1, "all", "project")
    )
    export_lm_eval(steering, tmp_path / "v.pt", model)
    content = torch.load(tmp_path / "v.pt", weights_only=True)
    modules = dict(model.base_model.named_modules())

    def hooked(entry: dict[str, Any]) -> Any:
        vector, coefficient = entry["steering_vector"], entry["steering_coefficient"]

        def changed(states: Tensor) -> Tensor:
            if entry["action"] == "add":
                return states + vector * coefficient
            direction = vector / vector.norm()
            along = (states * direction).sum(-1, keepdim=True)
            return states + direction * (coefficient - along)

        return lambda module, args, output: (
            (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)
        )

    ids = torch.arange(3, 11)[None]
    hooks = [modules[name].register_forward_hook(hooked(entry)) for name, entry in content.items()]
    with torch.no_grad():
        by_hand = model(ids).logits
        for hook in hooks:
            hook.remove()
        with steering.apply(model):
            torch.testing.assert_close(model(ids).logits, by_hand, rtol=0, atol=1e-5)
        assert (model(ids).logits - by_hand).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([ExpertEdit({1: {3: 1.0}})], "names expert 3 of layer 1"),
        ([ResidualEdit(vectors(1), 1, "answer")], "'answer', not 'all'"),
        ([ResidualEdit(vectors(1), 0.5, "all", "project")], "wholly or not at all"),
        (
            [ResidualEdit(vectors(1), 1, "all", "project"), ResidualEdit(vectors(1), 1, "all")],
            "one entry a layer",
        ),
        ([ResidualEdit(vectors(1), 0, "all")], "changes nothing"),
    ],
    ids=["experts", "scope", "half projected", "projected and added", "nothing"],
)
def test_what_cannot_be_said_is_refused(edits: list[Any], message: str, tmp_path: Path) -> None:
    model = shared("olmoe")
    with pytest.raises(ArtifactError, match=message):
        export_lm_eval(plan(model, *edits), tmp_path / "v.pt", model)
    assert not list(tmp_path.iterdir())


def test_names_and_models(tmp_path: Path) -> None:
    model = dense()
    steering = plan(model, ResidualEdit(vectors(1), 1, "all"))
    with pytest.raises(ArtifactError, match=r"ends with \.pt"):
        export_lm_eval(steering, tmp_path / "v.bin", model)
    with pytest.raises(ArchitectureMismatch):
        export_lm_eval(steering, tmp_path / "v.pt", shared("olmoe"))
    (tmp_path / "v.pt").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="already there"):
        export_lm_eval(steering, tmp_path / "v.pt", model)


def test_hook_points_of_other_families() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 2}
    names = {
        "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4),
        "gpt_neox": GPTNeoXConfig(**sizes, intermediate_size=64),
    }
    found = {name: hook_points(AutoModelForCausalLM.from_config(config)) for name, config in names.items()}
    assert found == {"gpt2": ["h.0", "h.1"], "gpt_neox": ["layers.0", "layers.1"]}
