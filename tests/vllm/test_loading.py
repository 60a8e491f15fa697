"""First plans that a worker cannot keep: it does not start, whatever else may be edited."""

from __future__ import annotations

import pytest
from torch import nn

from families import config_of, randomised
from steersman import Steering
from steersman.errors import ServingError
from steersman.vllm.bank import RouterPlace
from steersman.vllm.loading import _sites
from steersman.vllm.settings import Settings
from steersman.vllm.sites import RouterSite, Sites


def found(routers: dict[int, str | None], layers: int = 2) -> Sites:
    """What a worker finds: at each layer a router, and why it cannot be steered."""
    places = tuple(
        RouterSite(layer, nn.Module(), None, RouterPlace(layer, 8), reason)  # type: ignore[arg-type]
        for layer, reason in routers.items()
    )
    return Sites(places, {layer: nn.Module() for layer in range(layers)}, 64)


@pytest.mark.parametrize("sites", ["plans", "all"])
def test_a_plan_that_cannot_be_kept_is_never_dropped(sites: str) -> None:
    model = randomised(config_of("olmoe"), 0)
    plan, settings = Steering.from_experts(model, activate={1: [3]}), Settings(sites=sites)  # type: ignore[arg-type]

    kept = _sites(found({0: None, 1: None}), settings, [plan], 2)
    assert 1 in {site.layer for site in kept.routers}
    other = _sites(found({0: "its kernel", 1: None}), settings, [plan], 2)  # a router that no plan names
    assert [site.layer for site in other.routers] == [1]
    for routers, layers, reason in (
        ({0: None, 1: "its kernel"}, 2, "layer 1 cannot be steered here: its kernel"),
        ({0: None}, 2, "layer 1 cannot be steered here: it is not found"),
        ({0: None}, 1, "edits layer 1; the engine's model has 1 layer"),
    ):
        with pytest.raises(ServingError, match=reason):
            _sites(found(routers, layers), settings, [plan], layers)
