"""Affine maps from second moments: ridge regression in closed form, judged on held-out rows.

For standardised states, W, b minimise Σ|W h_s + b − h_t|² + ridge · rows · tr(Cov h_s)/d · |W|² (b free):
W = S_ts (S_ss + ridge · rows · tr(Cov h_s)/d · I)⁻¹, S centred sums of products, b = mean h_t − W mean h_s.
With S_ss = rows · U diag(λ) U' one eigendecomposition serves every ridge and every target. All float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steersman.concepts.joint_moments import COLUMNS, DRAWS, FIT, HELD_OUT, SKETCH, JointMoments
from steersman.ties import largest

RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 5))
"""1e-5 to 100 in half decades: where states do not vary, products in float32 are off by some 1e-6, which a
map divides by the ridge."""
R2_TIE = 1e-5
"""Two R² that differ by no more are equal: products are judged in float32."""

_CONSTANT = 1e-9
"""A spread below this share of the mean is roundoff."""
_MOST_CONDITION = 1e16
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Basis:
    """A source layer's states: their means and inverse spreads [d] (0 for a constant dimension), eigenvalues
    [d] and eigenvectors [d, d] of their correlations, and held-out products in that basis [d, d].
    """

    index: int
    mean: Tensor
    inverse: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    held_out: Tensor

    @property
    def penalty(self) -> float:
        """What a ridge of 1 adds to each eigenvalue: tr(Cov)/d."""
        return float(self.eigenvalues.sum() / len(self.eigenvalues))

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the eigenvalues of the correlations (Roy and Vetterli 2007)."""
        return effective_rank(self.eigenvalues)

    @property
    def condition(self) -> float:
        """The largest eigenvalue over the smallest, at most 1e16."""
        largest = float(self.eigenvalues.max())
        return min(largest / max(float(self.eigenvalues.min()), largest / _MOST_CONDITION), _MOST_CONDITION)


@dataclass(frozen=True)
class Pair:
    """How well a source layer explains a target layer.

    `r2` is 1 − ΣSS_res/ΣSS_tot over standardised dimensions, of held-out rows about the fitted rows' means;
    `r2_control` and `control_sd` mean and spread of the same over rows paired between texts.
    """

    ridge: float
    r2: float
    r2_control: float
    control_sd: float


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of values as shares of their sum; 0 where all are 0."""
    positive = values[values > 0]
    if not len(positive):
        return 0.0
    shares = positive / positive.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def spreads(moments: JointMoments) -> tuple[Tensor, Tensor]:
    """Inverse spreads of the fitted rows, of x [Ls·ds] and y [Lt·dt]: 0 where a dimension is constant."""
    part = moments.parts[FIT]
    squares_x = torch.stack([block.diagonal() for block in part.xx]).flatten()
    found = []
    for total, squares, centre in (
        (part.x, squares_x, moments.centres[0]),
        (part.y, part.y2, moments.centres[1]),
    ):
        mean = total / part.rows
        spread = (squares / part.rows - mean**2).clamp(min=0).sqrt()
        constant = spread <= _CONSTANT * (mean + centre).abs()
        found.append(torch.where(constant, 0.0, 1.0 / spread.masked_fill(constant, 1.0)))
    return found[0], found[1]


def source_basis(moments: JointMoments, index: int, inverse: Tensor) -> Basis:
    """The basis of source layer number `index`; `inverse` as by `spreads`, of x."""
    fit, held = moments.parts
    width = moments.sides.source_width
    place = slice(index * width, (index + 1) * width)
    scale = inverse[place]
    mean = fit.x[place] / fit.rows
    correlations = (fit.xx[index] / fit.rows - mean.outer(mean)) * scale.outer(scale)
    eigenvalues, vectors = torch.linalg.eigh((correlations + correlations.T) / 2)
    about = _about(held.xx[index], held.x[place], held.x[place], mean, mean, held.rows)
    return Basis(
        index=index,
        mean=mean + moments.centres[0][place],
        inverse=scale,
        eigenvalues=eigenvalues.clamp(min=0),
        vectors=vectors,
        held_out=vectors.T @ (about * scale.outer(scale)) @ vectors,
    )


def _about(products: Tensor, a: Tensor, b: Tensor, at: Tensor, bt: Tensor, rows: int) -> Tensor:
    """Sums of products about (at, bt) instead of 0: Σ(u − at)(v − bt)'."""
    moved = products.clone()
    return moved.addr_(a, bt, alpha=-1).addr_(at, b, alpha=-1).addr_(at, bt, alpha=rows)


class Fitting:
    """Fits of one source layer to every target layer, and how each does on held-out rows.

    Args:
        moments: With fitted and held-out rows.
        index: Number of the source layer.
        inverse: As by `spreads`.
    """

    def __init__(self, moments: JointMoments, index: int, inverse: tuple[Tensor, Tensor]) -> None:
        moments.flush()
        self._moments, self._inverse_y = moments, inverse[1]
        self.basis = source_basis(moments, index, inverse[0])
        self._rounded_vectors = self.basis.vectors.T.float()
        self._rounded_held_out = self.basis.held_out.float()
        self._last: tuple[int, tuple[Tensor, Tensor, Tensor]] | None = None

    def pair(self, target: int, ridges: tuple[float, ...] = RIDGES) -> Pair:
        """How target layer number `target` is explained, with the ridge that does best on held-out rows."""
        fitted, held, total = self._products(target)
        rounded = fitted.float()  # what judges may be rounded as held-out products are
        gram = (rounded @ rounded.T).double().mul_(self.basis.held_out)
        cross = (rounded * held).sum(1).double()
        gains = self._gains(ridges)
        residual = total - 2 * gains @ cross + ((gains @ gram) * gains).sum(1)
        # Where the ridge hardly matters, the last digits would choose it: the largest that does as well.
        best = largest(range(len(ridges)), lambda n: -residual[n], 0.0, R2_TIE * float(total))[-1]
        control = self._control(target, gains[best])
        return Pair(
            ridge=ridges[best],
            r2=float(1 - residual[best] / total) if total > 0 else 0.0,
            r2_control=float(control.mean()),
            control_sd=float(control.std()),
        )

    def effective_rank(self, target: int, ridge: float) -> float:
        """exp of the entropy of the singular values of the standardised map."""
        mapped = self._gains((ridge,))[0][:, None] * self._products(target)[0]
        return effective_rank(torch.linalg.eigvalsh(mapped @ mapped.T).clamp(min=0).sqrt())

    def affine(self, target: int, ridge: float) -> tuple[Tensor, Tensor]:
        """W [dt, ds] and b [dt] for states as they are, not standardised."""
        fit, width = self._moments.parts[FIT], self._moments.sides.target_width
        place = slice(target * width, (target + 1) * width)
        fitted, _, _ = self._products(target)
        standard = (self.basis.vectors @ (self._gains((ridge,))[0][:, None] * fitted)).T
        inverse = self._inverse_y[place]
        spread = torch.where(inverse > 0, 1 / inverse.masked_fill(inverse == 0, 1.0), 0.0)
        weight = spread[:, None] * standard * self.basis.inverse
        mean = fit.y[place] / fit.rows + self._moments.centres[1][place]
        return weight, mean - weight @ self.basis.mean

    def _gains(self, ridges: tuple[float, ...]) -> Tensor:
        """1/(λ + ridge · tr(Cov)/d), [ridges, d]; 0 where there is nothing to divide by."""
        of = torch.tensor(ridges, dtype=torch.float64)[:, None]
        divisor = self.basis.eigenvalues + of * self.basis.penalty
        return torch.where(divisor > 0, 1 / divisor.masked_fill(divisor <= 0, 1.0), 0.0)

    def _products(self, target: int) -> tuple[Tensor, Tensor, Tensor]:
        """U'S_xy of the fitted rows (over their number) and of held-out ones, [d, dt], these in float32;
        held-out ΣSS_tot.
        """
        if self._last is None or self._last[0] != target:
            self._last = target, self._new_products(target)
        return self._last[1]

    def _new_products(self, target: int) -> tuple[Tensor, Tensor, Tensor]:
        fit, held = self._moments.parts
        source, width = self.basis.index, self._moments.sides
        rows = slice(source * width.source_width, (source + 1) * width.source_width)
        place = slice(target * width.target_width, (target + 1) * width.target_width)
        number = width.number_of[source, target]
        inverse = self._inverse_y[place]
        scale = self.basis.inverse[:, None] * inverse
        mean_x, mean_y = fit.x[rows] / fit.rows, fit.y[place] / fit.rows
        fitted = (fit.xy[number] / fit.rows).addr_(mean_x, mean_y, alpha=-1) * scale
        held_xy = _about(held.xy[number], held.x[rows], held.y[place], mean_x, mean_y, held.rows) * scale
        squares = held.y2[place] - 2 * mean_y * held.y[place] + held.rows * mean_y**2
        vectors = self.basis.vectors.T
        return vectors @ fitted, self._rounded_vectors @ held_xy.float(), (squares * inverse**2).sum()

    def _control(self, target: int, gain: Tensor) -> Tensor:
        """R² with rows paired between texts, [draws]."""
        fit, held = self._moments.parts
        width = self._moments.sides.source_width
        rows = slice(self.basis.index * width, (self.basis.index + 1) * width)
        place = slice(target * SKETCH, (target + 1) * SKETCH)
        number = self._moments.sides.number_of[self.basis.index, target]
        scale = self.basis.inverse[:, None]
        mean_x, mean_z = fit.x[rows] / fit.rows, fit.z[place] / fit.rows
        fitted = (fit.xz[number] / fit.rows).addr_(mean_x, mean_z, alpha=-1) * scale
        held_xz = _about(held.xz[number], held.x[rows], held.z[place], mean_x, mean_z, held.rows) * scale
        # As their products were, and as a control may be, in float32.
        vectors = self._rounded_vectors
        mapped = gain[:, None].float() * (vectors @ fitted.float())
        cross = (mapped * (vectors @ held_xz.float())).sum(0, dtype=torch.float64)
        square = (mapped * (self._rounded_held_out @ mapped)).sum(0, dtype=torch.float64)
        total = held.z2[place] - 2 * mean_z * held.z[place] + held.rows * mean_z**2
        residual, total = (
            (each.reshape(DRAWS, COLUMNS).sum(1)) for each in (total - 2 * cross + square, total)
        )
        return 1 - residual / total.clamp(min=torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class HeldOut:
    """Centred second moments of held-out rows of one pair of layers, for what a map explains of a concept."""

    xx: Tensor
    yx: Tensor
    yy: Tensor

    def share(self, weight: Tensor, vector: Tensor) -> float:
        """corr² of û·h_target with û·(W h_source), û = Wv/|Wv|; 0 where either does not vary."""
        mapped = weight.double() @ vector.double()
        norm = mapped.norm()
        if not norm > 0:
            return 0.0
        back = weight.double().T @ (mapped / norm)
        along = mapped / norm
        covariance = along @ self.yx.double() @ back
        variances = (along @ self.yy.double() @ along) * (back @ self.xx.double() @ back)
        return float(covariance**2 / variances) if variances > 0 else 0.0


def held_out_moments(moments: JointMoments, source: int, target: int) -> HeldOut:
    """Second moments a row of held-out rows about their own means, of one pair of layers by their numbers."""
    held, sides = moments.parts[HELD_OUT], moments.sides
    rows = slice(source * sides.source_width, (source + 1) * sides.source_width)
    place = slice(target * sides.target_width, (target + 1) * sides.target_width)
    number = sides.number_of[source, target]
    x, y = held.x[rows] / held.rows, held.y[place] / held.rows
    return HeldOut(
        xx=held.xx[source] / held.rows - x.outer(x),
        yx=(held.xy[number] / held.rows - x.outer(y)).T.contiguous(),
        yy=held.yy[target] / held.rows - y.outer(y),
    )
