"""Attaching residual edits to the outputs of a model's decoder layers, whatever the family."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steersman.concepts.residual import NOTHING, Add, Project, Slots, Step, edit_states, steps_of
from steersman.concepts.states import state_of
from steersman.edits import residual_edits
from steersman.errors import ModelError, PlanError, SteeringNotApplied
from steersman.models.architecture import decoder_config, decoder_layers
from steersman.models.attachment import attaches
from steersman.models.overflow import overflown
from steersman.models.program import Layout, Pass, Program
from steersman.models.steered import Current, SteeredModule, outside_of_forward, steered
from steersman.models.streams import check_stream


@attaches("block_output")
def attach_blocks(model: nn.Module, layers: list[int] | None, current: Current) -> dict[int, SteeredBlock]:
    """Steer the outputs of some decoder layers (None: all) whenever the running thread has a plan for them.

    Raises:
        PlanError: a layer does not exist, or is the same module as another, or the layers do not give one
            residual stream; nothing is attached then.
    """
    check_stream(model, layers or ())
    modules = list(decoder_layers(model))
    layers = list(range(len(modules))) if layers is None else layers
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise PlanError(f"layer {layer} does not exist: the model has layers 0 to {len(modules) - 1}")
        if sum(module is modules[layer] for module in modules) > 1:
            raise PlanError(f"layer {layer} is one module with another layer: it cannot be steered alone")
    width = decoder_config(model).hidden_size
    return {layer: _attach(modules[layer], layer, width, current) for layer in layers}


_attached: weakref.WeakKeyDictionary[nn.Module, SteeredBlock] = weakref.WeakKeyDictionary()


def _attach(module: nn.Module, layer: int, width: int, current: Current) -> SteeredBlock:
    block = steered(module, SteeredBlock, _attached)
    block.attach(module, layer, width, current)
    return block


FEW = 0.5
"""Up to this share of a forward's tokens, those that are edited are taken out and put back."""


@dataclass
class BlockEdit:
    """What holds for the tokens of one forward at one layer: the same steps for all, or rows of tables.

    `index` is the row of each token; or of those named in `held` alone, where the others have no edits.
    """

    table: BlockTable
    shape: torch.Size
    """Of the states that it is for: [rows, columns, width]."""
    steps: Sequence[Step]
    index: Tensor | None = None
    held: Tensor | None = None
    dtype: torch.dtype | None = None
    """Of the states that `apply` is for; None: not yet known."""

    def __post_init__(self) -> None:
        self.apply: Callable[[Tensor], Tensor] = self._run

    def prepare(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Find the shortest way for states of a dtype.

        Raises `SteeringNotApplied` where a vector overflows in it.
        """
        self.table.check(dtype)
        self.dtype = dtype
        only = self.steps[0] if len(self.steps) == 1 else None
        if isinstance(only, Add) and dtype == torch.float32:
            self.apply = only.vector.add  # a decode step has little else to do
        else:
            self.apply = self._run
        return self.apply

    def touched(self, states: Tensor) -> Tensor:
        """The states of the tokens that may be edited, [tokens, width] or as given."""
        return states if self.held is None else states.reshape(-1, states.shape[-1])[self.held]

    def _run(self, states: Tensor) -> Tensor:
        if self.index is None:
            return edit_states(states, self.steps)
        flat, steps = states.reshape(-1, states.shape[-1]), self.table.slots.at(self.index)
        if self.held is None:
            return edit_states(flat, steps).view(states.shape)
        edited = edit_states(flat.index_select(0, self.held), steps)
        return flat.index_copy(0, self.held, edited).view(states.shape)


class SteeredBlock(SteeredModule):
    """One decoder layer's forward, run under the plan of the running pass."""

    def __init__(self) -> None:
        super().__init__()
        self._compiled = CompiledBlock()

    def attach(self, module: nn.Module, layer: int, width: int, current: Current) -> None:
        """Take the place of the layer's forward."""
        self._layer, self._width = layer, width
        self._attach(module, ("block_output", layer), current)

    def _release(self) -> None:
        return

    def _edit_of(self, running: Pass, device: torch.device) -> BlockEdit | None:
        shape = torch.Size((*running.shape, self._width))
        table = table_of(running.program, self._layer, self._width, device)
        return table.edit_of(running.layout, device, shape)

    def _steer(self, running: Pass, edit: BlockEdit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self._original(*args, **kwargs)
        states = self._states(output)
        if states.shape != edit.shape:
            raise SteeringNotApplied(
                f"layer {self._layer} gives states of shape {list(states.shape)}; "
                f"{list(edit.shape)} can be steered"
            )
        apply = edit.apply if states.dtype is edit.dtype else self._prepared(running, states)
        edited = apply(states)
        if states.dtype is torch.float16:
            largest = overflown(edit.touched(states), edit.touched(edited))
            running.overflows.enter(self._key, largest, edit.table.largest)
        if running.program.wants_changes:
            running.count_changed(self._key, (edited != states).any(dim=-1).reshape(-1))
        return _with_states(output, edited)

    def _prepared(self, running: Pass, states: Tensor) -> Callable[[Tensor], Tensor]:
        """The way for the states of this forward, kept for those of its form: on the device where they are,
        since the input of an offloaded layer waits elsewhere.
        """
        edit = running.layout.edits[self._key] = self._edit_of(running, states.device)
        if edit is None:
            raise SteeringNotApplied(
                f"layer {self._layer}: its edits were lost on the way to {states.device}"
            )
        return edit.prepare(states.dtype)

    def _states(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        try:
            return state_of(output)
        except ModelError as error:
            raise SteeringNotApplied(f"layer {self._layer} cannot be steered: {error}") from None

    # ------------------------------------------------------------ compiled code

    def publish(self, running: Pass | None, size: int, device: torch.device) -> None:
        """Lay out the plan of a forward for compiled code, which cannot ask for it.

        Raises `SteeringNotApplied` where a vector overflows in a model of float16.
        """
        if running is not None and self._runs_in(torch.float16):  # compiled code does not look at numbers
            table_of(running.program, self._layer, self._width, device).check(torch.float16)
        self._compiled.publish(running, self._layer, self._width, size, device)

    def withdraw(self, running: Pass | None) -> bool:
        """Take the plan away again; returns whether compiled code has followed it."""
        found = self._compiled.overflown
        if found is not None and running is not None and self._key in running.program.sites:
            running.overflows.enter(self._key, found.clone(), self._compiled.reach)
        return self._compiled.withdraw()

    def _runs_in(self, dtype: torch.dtype) -> bool:
        parameters = () if self._module is None else self._module.parameters()
        return next((p.dtype for p in parameters if p.is_floating_point()), None) is dtype

    def _run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._compiled
        if state.index is None:
            raise outside_of_forward("decoder layer")
        output = self._original(*args, **kwargs)
        states = state_of(output)
        if states.dim() != 3 or states.shape[0] * states.shape[1] != state.index.shape[0]:
            raise SteeringNotApplied(f"layer {self._layer} gives something else than one state a token")
        edited = state.run(states.reshape(-1, states.shape[-1])).view(states.shape)
        if states.dtype is torch.float16:
            state.overflown = overflown(states, edited)
        state.ran = True
        return _with_states(output, edited)


def _with_states(output: Any, states: Tensor) -> Any:
    """A layer's output with other states."""
    if isinstance(output, Tensor):
        return states
    return type(output)((states, *output[1:]))


class BlockTable:
    """The rows of a program at one layer's output, on one device."""

    def __init__(self, program: Program, layer: int, width: int, device: torch.device) -> None:
        self._layer = layer
        rows = [steps_of(residual_edits(edits), layer) for edits in program.rows]
        self._rows = [[_on(step, device) for step in steps] for steps in rows]
        self.slots = Slots(rows, width, device)
        self._busy = [bool(steps) for steps in rows]
        self.largest = max(_largest(steps) for steps in rows)

    def edit_of(self, layout: Layout, device: torch.device, shape: torch.Size) -> BlockEdit | None:
        """What holds for the tokens of a forward; None: nothing for any of them, as far as the host can
        tell.
        """
        if layout.row is not None:
            steps = self._rows[layout.row]
            return BlockEdit(self, shape, steps) if steps else None
        if not self.slots.tables:
            return None
        index, held = layout.index_on(device), layout.tokens_of_rows(self._busy, device)
        if held is None or len(held) > FEW * len(index):
            return BlockEdit(self, shape, (), index)
        return BlockEdit(self, shape, (), index[held], held) if len(held) else None

    def check(self, dtype: torch.dtype) -> None:
        """Raise `SteeringNotApplied` where a vector cannot be had in the states' dtype."""
        if self.largest > torch.finfo(dtype).max:
            raise SteeringNotApplied(
                f"layer {self._layer}: strength times vector reaches {self.largest:.3g}, and {dtype} holds "
                f"{torch.finfo(dtype).max:.5g} at most: run the model in bfloat16 or float32"
            )


def _largest(steps: Iterable[Step]) -> float:
    return max((float(step.vector.abs().max()) for step in steps if isinstance(step, Add)), default=0.0)


def _on(step: Step, device: torch.device) -> Step:
    if isinstance(step, Add):
        return Add(step.vector.to(device))
    return Project(step.direction.to(device), step.share.to(device))


def table_of(program: Program, layer: int, width: int, device: torch.device) -> BlockTable:
    """The table of one layer under a program, made once for each device."""
    tables: dict[torch.device, BlockTable] = program.compiled.setdefault(("block_output", layer), {})
    if device not in tables:
        with torch.inference_mode(False):  # kept, and used where gradients are wanted too
            tables[device] = BlockTable(program, layer, width, device)
    return tables[device]


class CompiledBlock:
    """What compiled code reads of a plan: tensors that change their content from plan to plan, not their
    form. One slot that adds is always there; more make code of their own.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        """The row of each token, int64 [tokens]; None where no forward runs."""
        self.ran = False
        self.overflown: Tensor | None = None
        """What compiled code has found by `overflown`; None where it does not run in float16."""
        self.reach = 0.0
        """The largest number that the plan adds."""
        self._tables: list[Step] = []
        self._capacity = 0
        self._device: torch.device | None = None
        self._filled_from: weakref.ref[Program] | None = None

    def publish(self, running: Pass | None, layer: int, width: int, size: int, device: torch.device) -> None:
        """Lay out a plan; None is that of unsteered tokens."""
        self.ran = False
        table = None if running is None else table_of(running.program, layer, width, device)
        given, self.reach = (None, 0.0) if table is None else (table.slots.tables, table.largest)
        self._allocate(len(given or ()), 1 if running is None else len(running.program.rows), width, device)
        if running is None or given is None:
            self.index = torch.zeros(size, dtype=torch.int64, device=device)  # row 0 has no edits
            return
        if self._filled_from is None or self._filled_from() is not running.program:
            self._fill(given)
            self._filled_from = weakref.ref(running.program)
        self.index = running.layout.index_on(device)

    def withdraw(self) -> bool:
        """Take the plan away."""
        self.index = self.overflown = None
        ran, self.ran = self.ran, False
        return ran

    def run(self, states: Tensor) -> Tensor:
        """States [tokens, width], edited."""
        for table in self._tables:
            if isinstance(table, Add):
                states = Add(table.vector[self.index])(states)
            else:
                states = Project(table.direction[self.index], table.share[self.index])(states)
        return states

    def _allocate(self, slots: int, rows: int, width: int, device: torch.device) -> None:
        """Make room for slots and rows: more than are needed, so that most plans find the same form."""
        slots = max(1, slots, len(self._tables))
        if len(self._tables) == slots and self._capacity >= rows and self._device == device:
            return
        self._capacity = max(8, self._capacity, 1 << (rows - 1).bit_length())
        self._device = device
        self._tables = Slots([[]] * self._capacity, width, device, slots).tables
        self._filled_from = None

    def _fill(self, given: Sequence[Step]) -> None:
        for slot, table in enumerate(self._tables):
            source = given[slot] if slot < len(given) else None
            if isinstance(table, Add):
                _copy(table.vector, source.vector if isinstance(source, Add) else None, NOTHING)
            else:
                there = source if isinstance(source, Project) else None
                _copy(table.direction, None if there is None else there.direction, 0.0)
                _copy(table.share, None if there is None else there.share, 0.0)


def _copy(target: Tensor, source: Tensor | None, nothing: float) -> None:
    target.fill_(nothing)
    if source is not None:
        target[: len(source)] = source
