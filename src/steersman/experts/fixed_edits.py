"""Routers under strengths that are given outright, token by token: for measurements of many experts at once.

A plan says which tokens of a generation it holds for; a measurement knows its tokens, and gives every row of
a batch another expert. The routing is the same: `SteeredRouter`, by the model's own code.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from steersman.experts.router_tables import TokenEdit
from steersman.experts.routers import SteeredRouter
from steersman.models.architecture import RouterSite
from steersman.models.overflow import Overflows
from steersman.models.program import Pass
from steersman.models.steered import steered


class FixedRouter(SteeredRouter):
    """A router's forward under the edit that it was given last; None lets it run as it is."""

    edit: TokenEdit | None = None

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.edit is None:
            return self._original(*args, **kwargs)
        overflows = Overflows()
        output = self._route(self.edit, len(self.edit.strengths), args, kwargs, overflows)
        overflows.check()
        return output


class FixedEdits:
    """The routers of a model, each to be given an edit."""

    def __init__(self, routers: Mapping[int, FixedRouter]) -> None:
        self._routers = routers

    @contextmanager
    def given(self, edits: Mapping[int, TokenEdit]) -> Iterator[None]:
        """While open, forwards run under these edits, by layer: one row of strengths for each token."""
        for layer, edit in edits.items():
            self._routers[layer].edit = edit
        try:
            yield
        finally:
            for layer in edits:
                self._routers[layer].edit = None


_known: weakref.WeakKeyDictionary[nn.Module, FixedRouter] = weakref.WeakKeyDictionary()


@contextmanager
def fixed_edits(sites: Sequence[RouterSite]) -> Iterator[FixedEdits]:
    """While open, the routers of some layers can be given edits. They are put back afterwards."""
    routers: dict[int, FixedRouter] = {}
    try:
        for site in sites:
            router = steered(site.module, FixedRouter, _known)
            router.attach(site, _nobody)
            routers[site.facts.layer] = router
        yield FixedEdits(routers)
    finally:
        for router in routers.values():
            router.detach()


def _nobody() -> Pass | None:
    return None
