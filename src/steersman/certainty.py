"""What may be said of an effect: that it is shown, that it is not shown, or that it cannot be told.

One rule for every report. An effect is *shown* where its interval is clear of 0 and it is beyond every
control that is due, of which there are enough to carry that; *not shown* where its interval lies inside ± a
margin that was stated beforehand; else one *cannot tell*. That an effect was not found says nothing by
itself: where too little was measured, nothing is found either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["shown", "not shown", "cannot tell"]
SHOWN: Verdict = "shown"
NOT_SHOWN: Verdict = "not shown"
CANNOT_TELL: Verdict = "cannot tell"

SIGNIFICANT = 0.05
"""Level of every p-value that decides."""

MARGIN = 0.05
"""Of differences of shares: inside ± 5 points they count as none. Other numbers have no margin, unless one
was stated for them.
"""


@dataclass(frozen=True)
class Control:
    """An effect among those of `count` random interventions: the share of all, itself counted, that do as
    much is its p-value.
    """

    count: int
    p: float

    @property
    def carries(self) -> bool:
        """Whether so many can show anything: the least p among B is 1/(B + 1) (Phipson and Smyth 2010)."""
        return 1 / (self.count + 1) <= SIGNIFICANT

    @property
    def beaten(self) -> bool:
        """Whether the effect is beyond them."""
        return self.carries and self.p <= SIGNIFICANT


NOT_RUN = Control(0, 1.0)
"""A control that is due, and was left out."""

LEAST_CONTROLS = math.ceil(1 / SIGNIFICANT) - 1
"""How many random interventions it takes to show anything against them: 19."""


def verdict(
    low: float | None,
    high: float | None,
    *,
    margin: float | None = None,
    p: float | None = None,
    controls: Sequence[Control] = (),
) -> Verdict:
    """What an interval and its controls let one say of an effect.

    Args:
        low, high: The effect's interval; None or NaN where there is none.
        margin: An effect inside ± this counts as none, in its own unit; None: none was stated.
        p: Of no effect, where it was adjusted for how many effects are looked at.
        controls: All that are due; none for what is no claim about this intervention among others of its
            shape (a side effect, an instruction).
    """
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return CANNOT_TELL
    clear = (low > 0 or high < 0) and (p is None or p <= SIGNIFICANT)
    if clear and all(control.beaten for control in controls):
        return SHOWN
    if margin is not None and -margin <= low and high <= margin:
        return NOT_SHOWN
    return CANNOT_TELL


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several claims made as one: shown where each is, not shown where one is not, else cannot tell."""
    if all(one == SHOWN for one in verdicts):
        return SHOWN
    return NOT_SHOWN if NOT_SHOWN in verdicts else CANNOT_TELL


def controls_in_words(control: Control, as_much: int, what: str = "random plans of its shape") -> str:
    """What a control says, without more comfort than is in it: "4 of 19 … did as much (p = 0.25)"."""
    if not control.count:
        return f"no {what} were run"
    p = p_value(control.p)
    found = f"{as_much} of {control.count} {what} did as much (p {p if p.startswith('<') else f'= {p}'})"
    return found if control.carries else f"{found}, and fewer than {LEAST_CONTROLS} can show nothing"


def p_value(p: float) -> str:
    """A p-value with as many digits as it deserves."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}".rstrip("0") if p < 0.1 else f"{p:.2f}"
