"""What a decoder layer gives and what the next one gets, seen from outside; what a plan may do between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steersman import Steering

LAYER, STRENGTH = 1, 2.0
ROWS, COLUMNS, NEW = 2, 7, 3


@dataclass
class Stream:
    """By forward: what the layer itself gave, what it gave under a plan, and what the next one got."""

    raw: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    next: list[Tensor] = field(default_factory=list)


@contextmanager
def watching(layers: nn.ModuleList, layer: int = LAYER) -> Iterator[Stream]:
    """Record a layer by a forward of our own under the one that a plan puts in place, and by hooks."""
    module, found = layers[layer], Stream()
    original = module.forward

    def inner(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        found.raw.append(_state(output))
        return output

    def following(_module: nn.Module, args: Any, kwargs: Any) -> None:
        found.next.append(_state(args[0] if args else kwargs["hidden_states"]))

    module.forward = inner
    handles = [
        module.register_forward_hook(lambda _m, _i, output: found.seen.append(_state(output))),
        layers[layer + 1].register_forward_pre_hook(following, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        del module.forward


def _state(output: Any) -> Tensor:
    return (output if isinstance(output, Tensor) else output[0]).detach().clone()


def assert_steered(model: nn.Module, layers: nn.ModuleList, vocabulary: int) -> None:
    """The vector is added at the tokens in scope and nowhere else, in a forward and while generating from
    left-padded prompts; what comes out is what the next layer reads; the rest is as it was.
    """
    ids = torch.randint(3, vocabulary, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids = ids.masked_fill(mask == 0, 0)
    vector = torch.randn(width_of(model), generator=torch.Generator().manual_seed(5))
    plan = Steering.from_vectors(model, {LAYER: vector}, strength=STRENGTH, scope="all")
    answer = Steering.from_vectors(model, {LAYER: vector}, strength=STRENGTH, scope="answer")
    base = _logits(model, ids)
    with (0 * plan).apply(model) as receipt:
        assert torch.equal(_logits(model, ids), base)
    assert receipt.tokens == {f"block_output:{LAYER}": ROWS * COLUMNS}
    with watching(layers) as found, plan.apply(model) as receipt:
        assert not torch.equal(_logits(model, ids), base)
    assert_added(found, vector, [torch.ones(ROWS, COLUMNS, dtype=torch.bool)])
    assert receipt.tokens == {f"block_output:{LAYER}": ROWS * COLUMNS}
    last = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    last[:, -1] = True
    step = torch.ones(ROWS, 1, dtype=torch.bool)
    for each, scope in ((plan, mask.bool()), (answer, last)):
        with watching(layers) as found, each.apply(model) as receipt:
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
            )
        assert_added(found, vector, [scope, step, step])
        assert receipt.tokens == {f"block_output:{LAYER}": int(scope.sum()) + 2 * ROWS}
    assert torch.equal(_logits(model, ids), base)


def assert_added(found: Stream, vector: Tensor, scopes: list[Tensor]) -> None:
    """In each forward the vector is added to the tokens in scope, bool [rows, columns], and to no others; and
    what comes of it is what the next layer gets.
    """
    assert len(found.raw) == len(found.seen) == len(found.next) == len(scopes)
    for number, (raw, seen, following) in enumerate(zip(found.raw, found.seen, found.next, strict=True)):
        again = raw.shape[1] > scopes[number].shape[1]  # without a cache everything is fed again
        scope = torch.cat(scopes[: number + 1], dim=1) if again else scopes[number]
        assert torch.equal(seen[scope], raw[scope] + STRENGTH * vector)
        assert torch.equal(seen[~scope], raw[~scope])
        assert torch.equal(following, seen)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def width_of(model: nn.Module) -> int:
    """The width of a model's residual stream."""
    width: int = model.config.get_text_config().hidden_size
    return width
