"""What is hooked into a steered model: its decoder, its `generate`, and every planned site.

What a site does is the business of its lever, which registers itself with `attaches`.
"""

from __future__ import annotations

import importlib
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from steersman.errors import PlanError, SteeringNotApplied
from steersman.models.adapters import unwrap
from steersman.models.architecture import find_decoder
from steersman.models.compiled import compiled_entrances, holds_compiled_code
from steersman.models.decoding import finding_stop_strings
from steersman.models.following import (
    Following,
    cache_length,
    cache_of,
    check_lengths,
    needs_roles,
    refuse_empty_scope,
)
from steersman.models.overflow import broken_tokens, states_of_output
from steersman.models.packing import refuse_packed
from steersman.models.program import Pass, Program, Site
from steersman.models.replacing import Restore, of_class, replace_method
from steersman.models.tokens import Tokens, tokens_of_forward
from steersman.steering import Steering

if TYPE_CHECKING:
    from steersman.models.apply import Context


class AttachedSite(Protocol):
    """A planned site of a model, as its lever has attached it."""

    def detach(self) -> None:
        """Put back what was there before."""

    def publish(self, running: Pass | None, size: int, device: torch.device) -> None:
        """Lay out the plan of a forward of `size` tokens for compiled code; None: that of no edits."""

    def withdraw(self, running: Pass | None) -> bool:
        """Take that plan away; returns whether compiled code has followed it. What it has made overflow is
        entered into the pass.
        """


Attacher = Callable[[nn.Module, list[int] | None, Callable[[], Pass | None]], Mapping[int, AttachedSite]]

_LEVERS = {"router": "steersman.experts.routers", "block_output": "steersman.concepts.blocks"}
"""The module that registers what edits at a kind of site do, by name: levers build on this one."""

_attachers: dict[str, Attacher] = {}

_NO_TURN = (None, (), None)

_CHANGED = (
    "a block was opened or closed while a thread generated under it: part of its output is not steered as "
    "planned; open the block before generate begins, and close it after the thread has ended"
)


def attaches(point: str) -> Callable[[Attacher], Attacher]:
    """Register how edits at one kind of site attach to a model.

    The function gets the model, layers (None: all that can be steered), and a callable that gives the running
    `Pass` (None where this thread is unsteered). It returns what it has attached at each layer, or raises
    with nothing attached.
    """

    def register(attacher: Attacher) -> Attacher:
        _attachers[point] = attacher
        return attacher

    return register


class Attachment:
    """What is hooked into one model while it has open blocks; everything is put back when the last one
    closes.
    """

    _known: ClassVar[weakref.WeakKeyDictionary[nn.Module, Attachment]] = weakref.WeakKeyDictionary()
    _guard = threading.RLock()

    def __init__(self, model: nn.Module) -> None:
        self.decoder = find_decoder(model)
        self.contexts: tuple[Context, ...] = ()
        self._restore: dict[tuple[str, nn.Module], Restore] = {}
        self._sites: dict[Site, AttachedSite] = {}
        self._programs: dict[tuple[Context, ...], Program] = {}
        self._local = threading.local()
        self._generating: list[tuple[Context, ...]] = []
        self._warned = False
        self._compiled = False
        self._compiled_turn = threading.RLock()

    @classmethod
    def open(cls, model: nn.Module, context: Context) -> Attachment:
        """Add a block to the attachment of a model: there is one for each decoder, however it is wrapped."""
        with cls._guard:
            attachment = cls._known.get(find_decoder(model)) or cls(model)
            attachment._open(model, context)
            return attachment

    def _open(self, model: nn.Module, context: Context) -> None:
        """Add hooks where the block needs new ones. Nothing stays behind when that fails."""
        _refuse_unsteerable_ways(model, self.decoder)
        contexts = (*self.contexts, context)
        steering = next((plan for plan in context.plans if plan is not None), None)
        if steering is not None:
            visible = tuple(other for other in contexts if other is context or other.holds_thread())
            Program(visible, steering.architecture)
        try:
            self._attach(model, context.sites)
        except BaseException:
            if not self.contexts:
                self._detach()
            raise
        self._known[self.decoder] = self
        self.contexts = contexts

    def close(self, context: Context) -> bool:
        """Remove a block; the last one takes all hooks with it.

        Returns whether a thread still generates under it.
        """
        with self._guard:
            in_use = any(context in contexts for contexts in self._generating)
            self.contexts = tuple(other for other in self.contexts if other is not context)
            for contexts in [contexts for contexts in self._programs if context in contexts]:
                self._programs.pop(contexts).forget()
            if not self.contexts:
                self._detach()
            return in_use

    def _attach(self, outer: nn.Module, sites: frozenset[Site]) -> None:
        model = unwrap(outer)
        if ("forward", self.decoder) not in self._restore:
            entrance = replace_method(self.decoder, "forward", self._run_forward(self.decoder))
            self._restore["forward", self.decoder] = entrance
        for name, wrapper in (
            ("generate", self._generate),
            ("generate_batch", self._refuse_continuous_batching),
            ("init_continuous_batching", self._refuse_continuous_batching),
            ("_get_stopping_criteria", self._stopping_criteria),
        ):
            # A decoder may be steered first, and then the model around it, which generates.
            if hasattr(model, name) and (name, model) not in self._restore:
                self._restore[name, model] = replace_method(model, name, wrapper)
        for owner, name in compiled_entrances(outer, self.decoder):
            if (name, owner) not in self._restore:
                self._restore[name, owner] = replace_method(owner, name, self._run_forward(owner))
        self._compiled = self._compiled or holds_compiled_code(outer)
        missing = sites - self._sites.keys()
        for point in sorted({point for point, _ in missing}):
            # Compiled code is made anew for every set of sites: it gets all of them at once.
            everything = self._compiled and all(where != point for where, _ in self._sites)
            layers = None if everything else sorted(layer for where, layer in missing if where == point)
            attached = _attacher(point)(model, layers, self.current)
            self._sites.update({(point, layer): site for layer, site in attached.items()})

    def _detach(self) -> None:
        for site in self._sites.values():
            site.detach()
        for restore in reversed(list(self._restore.values())):
            restore()
        self._sites.clear()
        self._restore.clear()
        self._compiled = False
        self._programs.clear()
        self._warned = False
        self._known.pop(self.decoder, None)  # it holds the model: unused, it must not keep it alive

    def _active(self) -> tuple[Context, ...]:
        if getattr(self._local, "unsteered", False):
            return ()
        return tuple(context for context in self.contexts if context.holds_thread())

    def current(self) -> Pass | None:
        """The running forward of this thread, None where the thread is unsteered.

        Raises:
            SteeringNotApplied: a site runs outside a forward of the decoder.
        """
        running: Pass | None = getattr(self._local, "running", None)
        if running is None and any(context.sites for context in self._active()):
            raise SteeringNotApplied(
                "a layer ran outside a forward of its decoder: call the model (or its decoder) itself"
            )
        return running

    # ------------------------------------------------------------ the decoder's forward

    def _run_forward(self, owner: nn.Module) -> Callable[..., Any]:
        """What takes the place of the decoder's forward, and of every way into compiled code that runs it."""

        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            inside: tuple[nn.Module, ...] = getattr(self._local, "inside", ())
            if owner in inside:
                return self._run_within_itself(forward, *args, **kwargs)
            begins = not inside  # else the way in, around this one, has begun the forward
            completed = False
            running: Pass | None = None
            self._local.inside = (*inside, owner)
            try:
                if begins:
                    running = self._begin(owner, args, kwargs)
                output = forward(*args, **kwargs)
                completed = True
            finally:
                self._local.inside = inside
                if begins:
                    self._end(completed)
            if running is not None and running.overflows:
                self._look_for_overflow(running, output, forward, _named(owner, args, kwargs))
            return output

        return run

    def _run_within_itself(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._turn()[1] is not None:
            raise SteeringNotApplied(
                "the model was called within its own forward (by a hook?): its tokens' roles cannot be told"
            )
        return forward(*args, **kwargs)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass | None:
        """Find out what each token of the forward that begins is to its row, and which plan it follows."""
        self._local.running = None
        active, program = self._turn()
        running: Pass | None = None
        if not active:
            self._warn_unsteered()
        elif program is not None:
            if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                raise SteeringNotApplied(
                    "a traced model would keep the plan of the block: trace it outside of it"
                )
            running = Pass(program, self._tokens(active, _named(module, args, kwargs)))
        if self._compiled:
            self._publish(running, _given(_named(module, args, kwargs)))
        self._local.running = running
        return running

    def _turn(self) -> tuple[tuple[Context, ...], Program | None]:
        """This thread's blocks, and what they do together; None where their plans are empty: then there is
        nothing to miss.
        """
        if getattr(self._local, "unsteered", False):
            return (), None
        known: tuple[Any, tuple[Context, ...], Program | None] = getattr(self._local, "turn", _NO_TURN)
        if known[0] is not self.contexts:
            active = self._active()
            known = (self.contexts, active, self._program(active))
            self._local.turn = known
        return known[1], known[2]

    def _program(self, active: tuple[Context, ...]) -> Program | None:
        if not any(context.sites for context in active):
            return None
        with self._guard:
            if active not in self._programs:
                architecture = next(p.architecture for c in active for p in c.plans if p is not None)
                self._programs[active] = Program(active, architecture)
            return self._programs[active]

    def _end(self, completed: bool) -> None:
        running: Pass | None = getattr(self._local, "running", None)
        self._local.running = None
        if getattr(self._local, "published", False):
            self._local.published = False
            followed = {key for key, site in self._sites.items() if site.withdraw(running)}
            self._compiled_turn.release()
            if running is not None:
                running.ran |= followed
        if running is not None and completed:
            running.close()

    def _look_for_overflow(
        self, running: Pass, output: Any, forward: Callable[..., Any], kwargs: dict[str, Any]
    ) -> None:
        """Whether edits in float16, or layers after them, went beyond its numbers: read at the end of
        `generate`, which would wait for the device at every token otherwise.
        """
        overflows = running.overflows
        states = states_of_output(output)
        rows, columns = running.shape
        if states is not None and states.shape[0] == rows and states.shape[1] <= columns:
            steered = running.steered(states.device)[:, columns - states.shape[1] :]
            cache = cache_of(kwargs)
            again = {name: value for name, value in kwargs.items() if value is not cache} | {
                "use_cache": False
            }

            def broken_alone() -> bool:
                alone = states_of_output(self._run_unsteered(forward, again))
                return alone is not None and bool((broken_tokens(alone) & steered).any())

            # One that went on from what others had left in a cache cannot be run again.
            first = cache is None or cache_length(cache) == columns
            overflows.follow((broken_tokens(states) & steered).any(), broken_alone if first else None)
        following: Following | None = getattr(self._local, "generation", None)
        if following is None:
            overflows.check()
        else:
            following.overflowed(overflows)

    def _run_unsteered(self, forward: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """A forward of this thread as if no block were open."""
        self._local.unsteered = True
        try:
            with torch.no_grad():
                if self._compiled:
                    self._publish(None, _given(kwargs))
                return forward(**kwargs)
        finally:
            self._local.unsteered = False
            self._end(False)

    def _publish(self, running: Pass | None, given: Tensor) -> None:
        """Lay out the plan where compiled code finds it, which is one place for all threads."""
        if running is not None and running.program.wants_changes:
            raise SteeringNotApplied('receipt="changes" needs code that is not compiled')
        self._compiled_turn.acquire()
        self._local.published = True
        for site in self._sites.values():
            site.publish(running, given.shape[0] * given.shape[1], given.device)

    def _warn_unsteered(self) -> None:
        if (
            not self._warned
            and not getattr(self._local, "unsteered", False)
            and any(context.sites for context in self.contexts)
        ):
            self._warned = True
            warnings.warn(
                "a model is running unsteered in a thread that has no plan, while another thread steers it; "
                'apply with threads="all" if that is not meant',
                stacklevel=2,
            )

    def _tokens(self, active: tuple[Context, ...], kwargs: dict[str, Any]) -> Tokens:
        given = _given(kwargs)
        rows, columns = given.shape[:2]
        cache = cache_of(kwargs)
        length = cache_length(cache)
        generation: Following | None = getattr(self._local, "generation", None)
        if generation is not None:
            if generation.contexts != active:
                raise SteeringNotApplied(_CHANGED)
            return generation.started().next(
                rows, columns, has_cache=cache is not None, cache_length=length, device=given.device
            )
        mask = _mask_of(kwargs)
        if needs_roles(_plans(active)):
            refuse_packed(kwargs, rows, columns, mask, length or 0)
        lengths = next((c.prompt_lengths for c in reversed(active) if c.prompt_lengths is not None), None)
        if lengths is None:
            refuse_empty_scope(_plans(active))
            if length and any(context.thread != threading.get_ident() for context in active):
                raise SteeringNotApplied(_CHANGED)  # a generation of another thread, begun before the block
        else:
            check_lengths(cache)
        return tokens_of_forward(
            rows,
            columns,
            mask=mask,
            cached=length or 0,
            prompt_lengths=lengths,
            device=given.device,
        )

    # ------------------------------------------------------------ generate

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        active = self._active()
        if not any(context.sites for context in active):
            return generate(*args, **kwargs)
        outer = getattr(self._local, "generation", None)
        following = Following(args, kwargs, active)
        self._local.generation = following
        for context in active:
            context.generated = True
        self._generating.append(active)
        try:
            with finding_stop_strings():
                output = generate(*args, **kwargs)
        finally:
            self._generating.remove(active)
            self._local.generation = outer
            self._local.running = None
        if self._active() != active:
            raise SteeringNotApplied(_CHANGED)
        following.finish(_plans(active))
        return output

    def _refuse_continuous_batching(self, start: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(context.sites for context in self.contexts):
            raise SteeringNotApplied(
                "continuous batching packs rows together and cannot be steered: use generate"
            )
        return start(*args, **kwargs)

    def _stopping_criteria(self, get: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        criteria = get(*args, **kwargs)
        following: Following | None = getattr(self._local, "generation", None)
        if following is None:
            if any(context.sites for context in self._active()):
                raise SteeringNotApplied(
                    "generate was reached by another way than model.generate (taken before the block, or "
                    "from the class), so its tokens' roles cannot be told: call model.generate"
                )
            return criteria
        config = kwargs["generation_config"] if "generation_config" in kwargs else args[0]
        return following.start(config, criteria)


def _attacher(point: str) -> Attacher:
    if point not in _attachers and point in _LEVERS:
        importlib.import_module(_LEVERS[point])
    if point not in _attachers:
        raise PlanError(f"edits at {point!r} cannot be applied to transformers models")
    return _attachers[point]


def _refuse_unsteerable_ways(model: nn.Module, decoder: nn.Module) -> None:
    """Raise `PlanError` for ways of running a model that would go around its plans."""
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        raise PlanError("gradient checkpointing reruns layers outside the forward: turn it off to steer")


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a module's forward by name."""
    if not args:
        return kwargs
    signature = inspect.signature(of_class(unwrap(module), "forward"))
    return {**signature.bind_partial(*args).arguments, **kwargs}


def _given(kwargs: dict[str, Any]) -> Tensor:
    given = kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
    if not isinstance(given, Tensor) or given.dim() < 2:
        raise SteeringNotApplied(
            "the decoder was called without input_ids or inputs_embeds of [rows, columns]"
        )
    return given


def refuse_steered(model: nn.Module, work: str) -> None:
    """Raise `PlanError` where this thread has a steering block open on the model: `work` compares with the
    model as it is, and would take the steered one for it.
    """
    attachment = Attachment._known.get(find_decoder(model))
    if attachment is not None and any(c.sites and c.holds_thread() for c in attachment.contexts):
        raise PlanError(
            f"the model is steered here: {work} compares with the model as it is, outside of the block"
        )


def _plans(contexts: tuple[Context, ...]) -> list[Steering | None]:
    return [plan for context in contexts for plan in context.plans]


def _mask_of(kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):  # of each kind of layer; one that sees everything tells most
        every = mask.get("full_attention")
        mask = every if every is not None else next((m for m in mask.values() if m is not None), None)
    if mask is not None and not isinstance(mask, Tensor):
        raise SteeringNotApplied("this form of attention mask does not tell which tokens are padding")
    return mask
