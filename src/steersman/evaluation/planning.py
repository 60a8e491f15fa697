"""Which arms an evaluation has: by steerings, an instruction, other models, strengths, attacks, defences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steersman.edits import finite_number
from steersman.errors import PlanError, told
from steersman.evaluation.arms import Arm
from steersman.evaluation.comparison import BASE
from steersman.evaluation.instructing import check_template

if TYPE_CHECKING:
    from steersman.steering import Steering


@dataclass(frozen=True)
class Cell:
    """One cell of a factorial: an attack's template (or none) × a defence's instruction × a plan."""

    attack: str | None
    defence: str | None
    steering: str | None
    arm: str


@dataclass(frozen=True)
class Arms:
    """The arms in order, base first, with what they are made of.

    `steering_of` names each arm's plan, `strength_of` its dial; `cells` are those of the factorial;
    `reversed_of` the reversed arm of a plan.
    """

    arms: tuple[Arm, ...]
    steering_of: Mapping[str, str]
    strength_of: Mapping[str, float]
    reversed_of: Mapping[str, str]
    cells: tuple[Cell, ...] = ()
    attacks: Mapping[str, str] = field(default_factory=dict)
    defences: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Arm]:
        return iter(self.arms)

    def named(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)


def plan_arms(
    steerings: Mapping[str, Steering],
    *,
    reverse: bool | Mapping[str, Steering] = False,
    instruction: str | None = None,
    others: Sequence[str] = (),
    strengths: Sequence[float] = (),
    attacks: Mapping[str, str] | None = None,
    defences: Mapping[str, str] | None = None,
) -> Arms:
    """Lay out the arms.

    Args:
        steerings: Name → plan: an arm each.
        reverse: Plans of the other direction, by the name of the plan that they reverse; True: each plan with
            its signs changed.
        instruction: A system prompt: an arm alone, and one with each plan.
        others: Names of other models: an arm each, unsteered.
        strengths: Dials of a dose–response: each plan times each of them.
        attacks: Name → template around the prompt ("{prompt}").
        defences: Name → system prompt. With attacks or defences, every combination of attack or none,
            defence or none, plan or none is a cell, and an arm where it is not one already.

    Raises:
        PlanError: two arms of one name, a plan that cannot be reversed or scaled.
        PairsError: an attack's template has no place for the prompt.
    """
    if isinstance(reverse, Mapping) and (unknown := [name for name in reverse if name not in steerings]):
        raise PlanError(
            f"there is no steering {unknown[0]!r} to reverse; there are {', '.join(steerings) or 'none'}"
        )
    if instruction is not None:
        _check_text(instruction, "the instruction")
    for kind, texts in (("attack", attacks or {}), ("defence", defences or {})):
        if not isinstance(texts, Mapping):
            raise PlanError(f"each {kind} has a name: give {{name: text}}, not {told(texts)}")
        for name, text in texts.items():
            _check_text(text, f"{kind} {name!r}")
            _check_text(name, f"the name of {kind} {name!r}")
    if isinstance(strengths, str) or not isinstance(strengths, Iterable):
        raise PlanError(f"strengths are {told(strengths)}: right is a list of numbers such as 0.5")
    strengths = [finite_number(strength, "each of the strengths") for strength in strengths]
    layout = _Layout()
    layout.add(Arm(BASE, None, "base"))
    for name, plan in steerings.items():
        layout.add(Arm(name, plan), name)
    for name, plan in steerings.items():
        layout.reverse(name, plan, reverse)
    if instruction is not None:
        layout.add(Arm("prompt", None, "prompt", system=instruction))
        for name, plan in steerings.items():
            layout.add(Arm(f"prompt+{name}", plan, "prompt+steered", system=instruction), name)
    for name in others:
        layout.add(Arm(name, None, "model", other=name))
    for name, plan in steerings.items():
        for strength in sorted({*strengths} - {0.0, 1.0}):
            arm = f"{name}@{_dial(strength)}"
            layout.add(Arm(arm, _scaled(plan, strength, arm), "strength"), name, strength)
    layout.cross(steerings, attacks or {}, defences or {})
    return Arms(
        tuple(layout.arms),
        layout.steering_of,
        layout.strength_of,
        layout.reversed_of,
        tuple(layout.cells),
        attacks or {},
        defences or {},
    )


class _Layout:
    def __init__(self) -> None:
        self.arms: list[Arm] = []
        self.steering_of: dict[str, str] = {}
        self.strength_of: dict[str, float] = {}
        self.reversed_of: dict[str, str] = {}
        self.cells: list[Cell] = []

    def add(self, arm: Arm, steering: str | None = None, strength: float = 1.0) -> None:
        if not isinstance(arm.name, str) or not arm.name.strip() or not arm.name.isprintable():
            raise PlanError(f"{arm.name!r} is no name of an arm; right is one line of letters (NAME=PATH)")
        if any(arm.name == other.name for other in self.arms):
            raise PlanError(
                f"two arms are called {arm.name!r}: name steerings (NAME=PATH), other models, attacks and "
                "defences apart"
            )
        self.arms.append(arm)
        if steering is not None:
            self.steering_of[arm.name] = steering
            self.strength_of[arm.name] = strength

    def reverse(self, name: str, plan: Steering, reverse: bool | Mapping[str, Steering]) -> None:
        if reverse is False:
            return
        if reverse is True:
            try:
                back = plan.reversed()
            except PlanError as error:
                raise PlanError(
                    f"{name} cannot be reversed by changing its signs ({error}); name the plan of the other "
                    "direction (--reversed, in Python reverse={name: plan})"
                ) from None
        elif name in reverse:
            back = reverse[name]
        else:
            return
        arm = f"{name} reversed"
        self.add(Arm(arm, back, "reversed"), name, -1.0)
        self.reversed_of[name] = arm

    def cross(
        self, steerings: Mapping[str, Steering], attacks: Mapping[str, str], defences: Mapping[str, str]
    ) -> None:
        if not attacks and not defences:
            return
        for attack in (None, *attacks):
            for defence in (None, *defences):
                for steering in (None, *steerings):
                    self._cell(attack, defence, steering, steerings, attacks, defences)

    def _cell(
        self,
        attack: str | None,
        defence: str | None,
        steering: str | None,
        steerings: Mapping[str, Steering],
        attacks: Mapping[str, str],
        defences: Mapping[str, str],
    ) -> None:
        if attack is None and defence is None:
            self.cells.append(Cell(None, None, steering, steering or BASE))
            return
        parts = [part for part in (attack, defence, steering) if part is not None]
        name = " × ".join(parts)
        template = None if attack is None else check_template(attacks[attack], f"attack {attack!r}")
        arm = Arm(
            name,
            None if steering is None else steerings[steering],
            "cell",
            system=None if defence is None else defences[defence],
            template=template,
        )
        self.add(arm, steering)
        self.cells.append(Cell(attack, defence, steering, name))


def _check_text(text: str, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise PlanError(f"{what} is {text!r:.40}; right is a text with words in it")
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise PlanError(f"{what} holds half a character (a lone surrogate): right is UTF-8")


def _dial(strength: float) -> str:
    short = f"{strength:g}"
    return short if float(short) == strength else repr(strength)


def _scaled(plan: Steering, strength: float, name: str) -> Steering:
    try:
        return strength * plan
    except PlanError as error:
        raise PlanError(f"{name}: scaled by {strength:g}, {error}") from None
