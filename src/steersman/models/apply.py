"""Applying plans to a running model: `with` blocks that say who is steered, in which thread and row."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal

from torch import nn

from steersman.edits import finite_number, whole
from steersman.errors import (
    ArchitectureMismatch,
    PlanError,
    SteeringNotApplied,
    WeightsMismatch,
    check_kind,
    told,
)
from steersman.models.adapters import active_adapters, check_module
from steersman.models.architecture import read_architecture
from steersman.models.attachment import Attachment
from steersman.models.identity import has_weights, weights_id
from steersman.models.program import Site
from steersman.models.receipt import Receipt
from steersman.models.weights_ids import UNKNOWN, of_gguf
from steersman.showing import count_of
from steersman.steering import Steering

Match = Literal["weights", "architecture"]
Threads = Literal["own", "all"]
ReceiptKind = Literal["tokens", "changes"]


def apply(
    model: nn.Module, steering: Steering, *, strength: float = 1.0, **options: Any
) -> AbstractContextManager[Receipt]:
    """Steer every row of a model with one plan. Options as of `apply_rows`."""
    return Context(model, _dialled([steering], strength), broadcast=True, **options)


def apply_rows(
    model: nn.Module,
    steerings: Sequence[Steering | None],
    *,
    strength: float | Sequence[float] = 1.0,
    match: Match = "weights",
    prompt_lengths: Sequence[int] | None = None,
    threads: Threads = "own",
    receipt: ReceiptKind = "tokens",
) -> AbstractContextManager[Receipt]:
    """Steer each row of the batch with its own plan; None leaves a row unsteered, as if alone.

    Args:
        model: Any transformers decoder model, also PEFT-wrapped or placed by accelerate.
        steerings: One plan (or None) for each row given to the model. Beams follow their row.
        strength: Multiplied into the plans for this block, of every row or row by row; the receipt's
            fingerprint is that of the plan as it ran.
        match: `weights` takes only the weights a plan was made for, `architecture` any of the same structure.
        prompt_lengths: Real tokens of each row's prompt, for forwards outside `generate`.
        threads: `own` steers the thread that enters the block; `all` also others, such as a streamer's.
        receipt: `changes` also counts the tokens whose chosen experts differ from the unsteered ones
            (slower).

    Returns:
        A context manager that gives the `Receipt`. Blocks nest and may be closed in any order.

    Raises:
        ArchitectureMismatch, WeightsMismatch: the plan is for another model; raised before anything is
            attached.
        PlanError: plans of nested blocks contradict each other.
        SteeringNotApplied: a planned edit did not take place, or the block ended without a forward.

    Example:
        >>> model, tokenizer = steersman.load_model("lab:moe")
        >>> plan = steersman.Steering.from_experts(model, {3: [5]})
        >>> with steersman.apply_rows(model, [plan, None]) as receipt:
        ...     _ = model(**tokenizer(["please give"] * 2, return_tensors="pt"))
        >>> receipt.tokens
        {'router:3': 2}
    """
    return Context(
        model,
        _dialled(steerings, strength),
        broadcast=False,
        match=match,
        prompt_lengths=prompt_lengths,
        threads=threads,
        receipt=receipt,
    )


def _dialled(
    steerings: Sequence[Steering | None], strength: float | Sequence[float]
) -> tuple[Steering | None, ...]:
    """Plans by row with their strengths multiplied in; rows alike share one."""
    if isinstance(steerings, Steering | str) or not isinstance(steerings, Iterable):
        raise PlanError(f"apply_rows takes a list with a plan or None for each row, not {told(steerings)}")
    steerings = list(steerings)
    for plan in steerings:
        if plan is not None:
            check_kind(plan, Steering, PlanError)
    by_row = isinstance(strength, Sequence) and not isinstance(strength, str)
    by_row = by_row or getattr(strength, "ndim", 0) == 1  # a tensor's or an array's numbers
    dials: list[Any] = list(strength) if by_row else [strength] * len(steerings)  # type: ignore[arg-type]
    if len(dials) != len(steerings):
        given = count_of(len(dials), "entry", "entries")
        raise PlanError(f"strength has {given} for {count_of(len(steerings), 'row')}")
    dials = [finite_number(dial, "strength (one of all rows, or a list of one a row)") for dial in dials]
    known: dict[tuple[int, float], Steering | None] = {}
    for plan, dial in zip(steerings, dials, strict=True):
        key = id(plan), dial
        if key not in known:
            known[key] = plan if plan is None or dial == 1 else plan * dial
    return tuple(known[id(plan), dial] for plan, dial in zip(steerings, dials, strict=True))


class Context(AbstractContextManager[Receipt]):
    """One `with` block: plans by row, for one thread or all."""

    def __init__(
        self,
        model: nn.Module,
        rows: tuple[Steering | None, ...],
        *,
        broadcast: bool,
        match: Match = "weights",
        prompt_lengths: Sequence[int] | None = None,
        threads: Threads = "own",
        receipt: ReceiptKind = "tokens",
    ) -> None:
        check_module(model)
        for name, value, known in (
            ("match", match, ("weights", "architecture")),
            ("threads", threads, ("own", "all")),
            ("receipt", receipt, ("tokens", "changes")),
        ):
            if value not in known:
                raise PlanError(f"{name}={value!r} is unknown: use {' or '.join(map(repr, known))}")
        if not rows:
            raise PlanError("apply_rows needs a plan or None for each row")
        if prompt_lengths is not None:
            single = isinstance(prompt_lengths, str) or getattr(prompt_lengths, "ndim", 1) != 1
            if single or not isinstance(prompt_lengths, Iterable):
                raise PlanError(f"prompt_lengths are whole numbers, one a row, not {told(prompt_lengths)}")
            prompt_lengths = [whole(length, "a prompt length of") for length in prompt_lengths]
            if any(length < 1 for length in prompt_lengths):
                raise PlanError("prompt_lengths must be at least 1 in every row")
        self._model: nn.Module | None = model
        self.rows = rows
        self.broadcast = broadcast
        self.match: Match = match
        self.prompt_lengths = prompt_lengths
        self.threads: Threads = threads
        self.receipt_kind: ReceiptKind = receipt
        self.plans: list[Steering | None] = list(
            {id(plan): plan for plan in rows}.values()
        )  # by identity: equal plans need not be found
        self._plan_of_row = [[id(plan) for plan in self.plans].index(id(plan)) for plan in rows]
        self.sites: frozenset[Site] = frozenset(
            (edit.point, layer)
            for plan in self.plans
            if plan is not None
            for edit in plan.edits
            for layer in edit.layers
        )
        self.forwards = 0
        self.generated = False
        self.thread: int | None = None
        self.receipt = Receipt(self)
        self._attachment: Attachment | None = None

    def plan_of_rows(self, rows: int, copies: int) -> list[int]:
        """Which of `plans` each row of a forward follows.

        Raises `SteeringNotApplied` where the rows do not fit.
        """
        self.check_rows(rows, copies)
        if self.broadcast:
            return [0] * rows
        return [plan for plan in self._plan_of_row for _ in range(copies)]

    def check_rows(self, rows: int, copies: int) -> None:
        """Raise `SteeringNotApplied` where the model was given other rows than there are plans."""
        given = rows // copies
        if not self.broadcast and given != len(self._plan_of_row):
            raise SteeringNotApplied(
                f"apply_rows has {count_of(len(self._plan_of_row), 'plan')}, but the model was given "
                f"{count_of(given, 'row')}"
            )

    def holds_thread(self) -> bool:
        """Whether the running thread is steered by this block."""
        return self.threads == "all" or self.thread == threading.get_ident()

    def __enter__(self) -> Receipt:
        model, self._model = self._model, None  # the receipt outlives the block, the model need not
        if model is None:
            raise PlanError("this block has been opened before: call apply again for another one")
        for plan in self.plans:
            if plan is not None:
                check_model(plan, model, self.match)
        self.thread = threading.get_ident()
        self._attachment = Attachment.open(model, self)
        return self.receipt

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        in_use = self._attachment is not None and self._attachment.close(self)
        self._attachment = None
        if kind is None and self.sites:
            self._check(in_use)

    def _check(self, in_use: bool) -> None:
        """Raise `SteeringNotApplied` where the block that ends has not steered what its user believes."""
        if in_use:
            raise SteeringNotApplied(
                "the block ended while a thread was still generating: the rest of its output is not steered; "
                "wait for the thread inside the block"
            )
        if self.forwards == 0:
            raise SteeringNotApplied(
                "the block ended without a steered forward of this model: nothing was steered"
            )
        if not any(self.receipt.tokens.values()):
            message = "the block ended without a token in the scope of its edits: nothing was steered"
            if not self.generated:
                raise SteeringNotApplied(message)
            warnings.warn(message, stacklevel=3)  # answers may end at once: that is no error


def check_model(steering: Steering, model: nn.Module, match: Match) -> None:
    architecture = read_architecture(model)
    if architecture.id != steering.architecture_id:
        raise ArchitectureMismatch(
            f"this steering is for {steering.architecture.in_words()}, the model is {architecture.in_words()}"
        )
    if match == "weights" and not has_weights(model, steering.weights_id):
        made_for = f" ({steering.model})" if steering.model else ""
        adapters = active_adapters(model)
        under = f" (the model runs with the adapter {', '.join(adapters)})" if adapters else ""
        file = " (a GGUF file's are others than those that it was quantised from)"
        if steering.weights_id == UNKNOWN:
            raise WeightsMismatch(
                f"this steering does not say which weights it is for{made_for}: they were not at hand when "
                'it was made; apply it with match="architecture" (--match architecture)'
            )
        raise WeightsMismatch(
            f"this steering was made for other weights{made_for}{under}"
            f"{file if of_gguf(weights_id(model)) != of_gguf(steering.weights_id) else ''}; "
            'apply it with match="architecture" (--match architecture) if that is meant'
        )
