"""How figures of an evaluation are written: rates, means and differences with their intervals."""

from __future__ import annotations

from typing import Any

from steersman.certainty import SIGNIFICANT, p_value
from steersman.evaluation.evaluation_report.place import MISSING, Piece, Place
from steersman.evaluation.report import percent, signed

Pieces = tuple[Piece, ...]


def in_points(share: float) -> str:
    """A difference of shares in percentage points, with one digit where it is small."""
    return signed(100 * share, 0 if abs(share) >= 0.01 else 1)


def measured(value: float) -> str:
    """A number of any size with three digits and a true minus."""
    return f"{value:.3g}".replace("-", "−")


def change(value: float) -> str:
    """A difference of such numbers, with its sign."""
    text = measured(abs(value))
    return text if value == 0 else ("+" if value > 0 else "−") + text


def is_rate(metric: Any) -> bool:
    """Whether a metric counts items rather than averaging numbers."""
    return bool(metric["kind"] == "rate")


def estimate(figure: Place) -> Pieces:
    """A rate or a mean."""
    if not figure:
        return (MISSING,)
    if "rate" in figure.value:
        return (figure["rate"].number(percent),)
    return (figure["mean"].number(measured),)


def interval(figure: Place) -> Pieces:
    """The interval of a rate, a mean or a difference; empty where it has none."""
    if not figure or figure.value["low"] is None or figure.value["high"] is None:
        return ()
    form = percent if "rate" in figure.value else measured
    if "difference" in figure.value:
        form = in_points if of_rates(figure) else change
    return (figure["low"].number(form), " to ", figure["high"].number(form))


def of_rates(difference: Place) -> bool:
    """Whether a difference is one of shares, so that it is told in percentage points."""
    return "only_first" in difference.value


def difference(found: Place) -> Pieces:
    """A difference; of shares in points."""
    if not found:
        return (MISSING,)
    if of_rates(found):
        return (found["difference"].number(in_points), " points")
    return (found["difference"].number(change),)


def adjusted_p(found: Place) -> Place:
    """The p-value that counts: adjusted for how many arms there are, where it is."""
    adjusted = found.get("p_holm")
    return adjusted if adjusted.value is not None else found.get("p")


def bootstrap(found: Place) -> Pieces:
    """The interval of a difference when whole groups are drawn again; a dash where there is none."""
    limits = found.get("bootstrap")
    if not limits or None in limits.value:
        return (MISSING,)
    form = in_points if of_rates(found) else change
    return (limits[0].number(form), " to ", limits[1].number(form))


def is_clear_alone(found: Place) -> bool:
    """Whether a difference would be told from none if no other arm were looked at."""
    p = found.get("p").value if found else None
    return p is not None and p <= SIGNIFICANT


def p_piece(place: Place) -> Piece:
    """A p-value."""
    return place.number(p_value)


def equals(piece: Piece) -> Pieces:
    """A p-value after "p": "= 0.01", or "< 0.001" as it is."""
    text = piece if isinstance(piece, str) else piece.text
    return (piece,) if text.startswith("<") else ("= ", piece)


def detectable(task: Place, metric: str, found: Place) -> Pieces:
    """The smallest difference that so many items would have shown; for this arm where that is known."""
    own = found.get("minimum_detectable") if found else Place(None)
    least = own if own.value is not None else task["minimum_detectable"].get(metric)
    rates = not found or of_rates(found)
    form = _in_points_unsigned if rates else measured
    if least.value is None or (rates and float(form(least.value)) >= 100):  # too few items to show any
        return ()
    return ("±", least.number(form), " points" if rates else "")


def _in_points_unsigned(share: float) -> str:
    return in_points(abs(share)).lstrip("+")
