"""Kernels in the place of modules: a router that they leave out is refused, or noticed before any output."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families as f
import ways as w
from steersman import ModelError, PlanError, SteeringNotApplied


class WholeBlock(nn.Module):
    """A kernel layer as those of the Hub are: stateless, and it routes by itself, without the router."""

    def forward(self, hidden_states: Tensor) -> Any:
        router = getattr(self, "router", None) or self.gate
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, chosen = torch.topk((flat @ router.weight.T).softmax(-1), 2)
        mixed = self.experts(flat, chosen, weights).view_as(hidden_states)
        return (mixed, weights) if hasattr(self, "router") else mixed


@contextmanager
def replaced(model: Any, way: str) -> Iterator[None]:
    """`by hand`: a block's forward bound to it as `kernelize` does; `kernelize`: by the package itself."""
    block = f.block_of(model, 1)
    name = "WholeBlockOfTests"
    had = type(block).__dict__.get("kernel_layer_name")
    type(block).kernel_layer_name = name  # what transformers' decorator sets where the package is installed
    try:
        if way == "by hand":
            block.forward = types.MethodType(WholeBlock.forward, block)
        else:
            kernelized(model, name)
        yield
    finally:
        if had is None:
            del type(block).kernel_layer_name
        else:
            type(block).kernel_layer_name = had


def kernelized(model: Any, name: str) -> None:
    kernels = pytest.importorskip("kernels", reason="the kernels package is not installed")

    class Repository:
        """A repository that needs no Hub."""

        layer_name = name

        def load(self) -> type[nn.Module]:
            return WholeBlock

    with kernels.use_kernel_mapping({name: {"cpu": Repository()}}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")


@pytest.mark.parametrize("name", w.WAYS_FAMILIES)
@pytest.mark.parametrize("way", ["by hand", "kernelize"])
def test_a_kernel_around_a_router_is_refused_by_name(name: str, way: str) -> None:
    model = f.tiny(name)
    plan = w.plan_of(model)
    with replaced(model, way):
        block = type(f.block_of(model, 1)).__name__
        assert torch.isfinite(w.logits(model)).all()
        with (
            pytest.raises(PlanError, match=rf"layer 1 .*WholeBlock in the place of {block}.*use_kernels"),
            plan.apply(model),
        ):
            pass
        del f.block_of(model, 1).forward  # and without it, all is as ever
        if way == "kernelize":
            del f.block_of(model, 2).forward
        w.steered(model, plan)


@pytest.mark.parametrize("name", w.WAYS_FAMILIES)
def test_a_kernel_put_there_inside_the_block_is_noticed(name: str) -> None:
    model = f.tiny(name)
    with w.plan_of(model).apply(model):
        w.logits(model)
        with replaced(model, "by hand"), pytest.raises(SteeringNotApplied, match="router:1"):
            w.logits(model)


def test_blocks_of_mxfp4_weights_are_refused() -> None:
    """GPT-OSS's checkpoints as they are stored: their kernel takes the router's weight, and leaves it out."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model: Any = f.tiny("gpt_oss")
    plan = w.plan_of(model)
    for layer in model.model.layers:
        if hasattr(mxfp4, "Mxfp4GptOssMLP"):
            layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, layer.mlp.experts)
        else:  # transformers 5.19
            layer.mlp.forward = types.MethodType(mxfp4.mlp_forward, layer.mlp)
    with pytest.raises(PlanError, match=r"layer 1 .*Mxfp4Config\(dequantize=True\)"), plan.apply(model):
        pass


def test_what_no_router_chose_is_not_counted() -> None:
    model = f.tiny("olmoe")
    with replaced(model, "by hand"):
        for layer in (0, 2):
            block = f.block_of(model, layer)
            block.forward = types.MethodType(WholeBlock.forward, block)
        with pytest.raises(ModelError, match="a kernel runs in its place"):
            w.counts(model)


def test_a_kernel_elsewhere_does_not_matter() -> None:
    """Norms and activations have no part in routing."""

    class Norm(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return nn.functional.rms_norm(
                hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon
            )

    model = f.tiny("olmoe")
    for module in model.modules():
        if type(module).__name__ == "OlmoeRMSNorm":
            module.forward = types.MethodType(Norm.forward, module)
    w.check_way(f.shared("olmoe"), model)
