"""Attaching expert edits to a model's routers, whatever the family, by the model's own routing code."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from steersman.errors import PlanError, SteeringNotApplied
from steersman.experts.interception import Interception, SteeringInterception
from steersman.experts.plain_routing import PlainRouting, plain_routing
from steersman.experts.router_tables import TokenEdit, table_of
from steersman.limits import Router
from steersman.models.architecture import RouterSite, find_routers
from steersman.models.attachment import attaches
from steersman.models.overflow import Watcher
from steersman.models.program import Pass, Program, Site
from steersman.models.steered import Current, SteeredModule, outside_of_forward, steered


@attaches("router")
def attach_routers(model: nn.Module, layers: list[int] | None, current: Current) -> dict[int, SteeredRouter]:
    """Steer the routers of some layers (None: all that can be steered) whenever the running thread has a plan
    for them.

    Raises:
        PlanError: a layer has no router that can be steered; nothing is attached then.
    """
    sites: dict[int, RouterSite] = {}
    for site in find_routers(model):
        sites.setdefault(site.facts.layer, site)  # that of the layer's experts comes first
    if layers is None:
        layers = [layer for layer, site in sites.items() if site.facts.reason is None]
    for layer in layers:
        if layer not in sites or sites[layer].facts.reason is not None:
            reason = sites[layer].facts.reason if layer in sites else "there is none"
            raise PlanError(f"the router of layer {layer} cannot be steered: {reason}")
    return {layer: _attach(sites[layer], current) for layer in layers}


_attached: weakref.WeakKeyDictionary[nn.Module, SteeredRouter] = weakref.WeakKeyDictionary()


def _attach(site: RouterSite, current: Current) -> SteeredRouter:
    router = steered(site.module, SteeredRouter, _attached)
    router.attach(site, current)
    return router


class SteeredRouter(SteeredModule):
    """One router's forward, run under the plan of the running pass."""

    def __init__(self) -> None:
        super().__init__()
        self._compiled = CompiledState()

    def attach(self, site: RouterSite, current: Current) -> None:
        """Take the place of the router's forward."""
        self._site: RouterSite | None = site
        self._facts = site.facts
        self._biased = site.correction_bias is not None
        # Another's wrapper (of an offloaded or a parallel router) has to be gone through.
        own = site.module.__dict__.get("forward") is None
        self._plain: PlainRouting | None = plain_routing(site) if own else None
        self._attach(site.module, ("router", site.facts.layer), current)

    def _release(self) -> None:
        self._site = self._plain = None

    @property
    def _attached_to(self) -> RouterSite:
        if self._site is None:
            raise SteeringNotApplied("a router runs that is not attached any more")
        return self._site

    def _edit_of(self, running: Pass, device: torch.device) -> TokenEdit | None:
        return table_of(running.program, self._facts, device).edit_of(running.layout, device)

    def _steer(self, running: Pass, edit: TokenEdit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if running.program.wants_changes:
            return self._run_and_compare(running, edit, args, kwargs)
        return self._route(edit, running.size, args, kwargs, running.overflows)

    def _route(
        self, edit: TokenEdit, size: int, args: tuple[Any, ...], kwargs: dict[str, Any], watcher: Watcher
    ) -> Any:
        plain = self._plain
        if plain is not None and len(args) == 1 and not kwargs and not self._attached_to.module.training:
            output = plain.run(args[0], edit, size, watcher)
            if output is not None:
                return output
        return self._intercept(edit, size, args, kwargs, watcher)[0]

    def _intercept(
        self,
        edit: TokenEdit,
        size: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        watcher: Watcher,
        reference: Interception | None = None,
    ) -> tuple[Any, SteeringInterception]:
        if reference is None and self._biased:
            reference = self._watch(args, kwargs)[1]
        steered = SteeringInterception(self._attached_to, edit, size, watcher, reference)
        with steered:
            output = self._original(*args, **kwargs)
        steered.check()
        return output, steered

    def _watch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Interception]:
        """A run without edits."""
        watched = Interception(self._attached_to)
        training = self._attached_to.module.training
        with torch.no_grad(), watched:
            output = self._original(*(_untouched(args) if training else args), **kwargs)
        return output, watched

    def _run_and_compare(
        self, running: Pass, edit: TokenEdit, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        unedited, watched = self._watch(args, kwargs)
        output, steered = self._intercept(edit, running.size, args, kwargs, running.overflows, watched)
        before, after = self._chosen(unedited, watched), self._chosen(output, steered)
        changed = (before.sort(dim=-1).values != after.sort(dim=-1).values).any(dim=-1)
        running.count_changed(self._key, changed)
        return output

    def _chosen(self, output: Any, watched: Interception) -> Tensor:
        """The expert ids [tokens, k] that a run of the router gave."""
        if watched.chosen is not None:
            return watched.chosen.reshape(-1, watched.chosen.shape[-1])
        return chosen_experts(output)

    # ------------------------------------------------------------ compiled code

    def publish(self, running: Pass | None, size: int, device: torch.device) -> None:
        """Lay out the plan of a forward for compiled code, which cannot ask for it."""
        self._compiled.publish(running, self._facts, size, device)

    def withdraw(self, running: Pass | None) -> bool:
        """Take the plan away again; returns whether compiled code has followed it."""
        found = self._compiled.overflown
        if found is not None and running is not None and self._key in running.program.sites:
            running.overflows.enter(self._key, found.clone())
        return self._compiled.withdraw()

    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._compiled
        if state.index is None:
            raise outside_of_forward("router")
        output = self._route(state.edit(), state.index.shape[0], args, kwargs, state)
        state.ran = True
        return output


class CompiledState:
    """What compiled code reads of a plan: tensors that change their content from plan to plan, not their
    form.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        """The row of each token, int64 [tokens]; None where no forward runs."""
        self.ran = False
        self.overflown: Tensor | None = None
        """What compiled code has found by `overflown`; None where it does not run in float16."""
        self._strengths: Tensor | None = None
        self._expert_rank: Tensor | None = None
        self._group_rank: Tensor | None = None
        self._filled_from: weakref.ref[Program] | None = None

    def publish(self, running: Pass | None, facts: Router, size: int, device: torch.device) -> None:
        """Lay out a plan; None is that of unsteered tokens."""
        self.ran = False
        self._allocate(facts, 1 if running is None else len(running.program.rows), device)
        if running is None:
            self.index = torch.zeros(size, dtype=torch.int64, device=device)  # row 0 has no edits
            return
        if self._filled_from is None or self._filled_from() is not running.program:
            self._fill(running, facts, device)
        self.index = running.layout.index_on(device)

    def withdraw(self) -> bool:
        """Take the plan away."""
        self.index = self.overflown = None
        ran, self.ran = self.ran, False
        return ran

    def enter(self, site: Site, largest: Tensor, reach: float = 0.0) -> None:
        """See `Watcher`; selection scores count as raw ones do."""
        self.overflown = largest if self.overflown is None else torch.maximum(self.overflown, largest)

    def edit(self) -> TokenEdit:
        """What holds for the tokens of the forward; always in the same form."""
        index = self.index
        groups = self._group_rank
        return TokenEdit(
            strengths=self._strengths[index],  # type: ignore[index]
            sources=None,
            expert_rank=self._expert_rank[index],  # type: ignore[index]
            group_rank=None if groups is None else groups[index],
            dead_rank=self._expert_rank[index].clamp(max=0),  # type: ignore[index]
        )

    def _allocate(self, facts: Router, rows: int, device: torch.device) -> None:
        """Make room for rows: more than are needed, so that most plans find the same form."""
        held = self._strengths
        if held is not None and held.shape[0] >= rows and held.device == device:
            return
        capacity = max(8, 1 << (rows - 1).bit_length())
        self._strengths = torch.zeros(capacity, facts.experts, device=device)
        self._expert_rank = torch.zeros(capacity, facts.experts, device=device)
        groups = facts.groups
        self._group_rank = None if groups is None else torch.zeros(capacity, groups[0], device=device)
        self._filled_from = None

    def _fill(self, running: Pass, facts: Router, device: torch.device) -> None:
        table = table_of(running.program, facts, device)
        held = (self._strengths, self._expert_rank, self._group_rank)
        for target, source in zip(held, table.tensors, strict=True):
            if target is not None:
                target.zero_()
                if source is not None:
                    target[: len(source)] = source
        self._filled_from = weakref.ref(running.program)


def chosen_experts(output: Any) -> Tensor:
    """The expert ids [tokens, k] in a router's output (the one integer tensor in it)."""
    for value in output:
        if isinstance(value, Tensor) and not value.is_floating_point():
            return value.reshape(-1, value.shape[-1])
    raise SteeringNotApplied("the router's output holds no expert ids")


def _untouched(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the inputs: a router in training may change its input in place."""
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)
