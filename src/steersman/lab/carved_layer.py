"""Mixture-of-Experts out of a dense gated FFN, one layer: shared neurons, balanced clusters, router, refit.

After MoEfication (arXiv 2110.01786: clusters of co-active neurons, of equal size) and CMoE (arXiv 2502.04416:
the neurons that fire most are shared and always run). An FFN adds down · (act(gate · x) * up · x), a sum over
neurons: cut into groups it is the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SPREAD = 0.05
"""Standard deviation of a token's router logits: the experts that are chosen weigh nearly alike."""
RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)
"""What is tried, relative to the mean energy of a neuron."""
STRONGEST = 4
"""A neuron fires at a token where its share is among the largest 1/4."""
_BATCH = 2048


@dataclass(frozen=True)
class CarvedLayer:
    """A gated FFN whose neurons are sorted: those that are shared, then the experts', one after the other.

    `gate`, `up` [neurons, width], `down` [width, neurons], `router` [experts, width] without a bias.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    router: Tensor
    shared: int
    top_k: int
    activation: Callable[[Tensor], Tensor]

    @property
    def size(self) -> int:
        """Neurons of an expert."""
        return (len(self.gate) - self.shared) // len(self.router)

    def active(self, x: Tensor) -> Tensor:
        """Neurons [tokens, neurons] as the dense FFN has them."""
        hidden: Tensor = self.activation(x @ self.gate.T) * (x @ self.up.T)
        return hidden

    def weights(self, x: Tensor) -> Tensor:
        """What each neuron is multiplied by [tokens, neurons]: 1 for the shared, for the experts top_k times
        their softmax over the chosen, so that 1 is the mean over those.
        """
        scores = x @ self.router.T
        chosen = scores.topk(self.top_k).indices
        kept = torch.zeros_like(scores).scatter_(1, chosen, scores.gather(1, chosen).softmax(1) * self.top_k)
        ones = torch.ones(len(x), self.shared, dtype=x.dtype, device=x.device)
        return torch.cat([ones, kept.repeat_interleave(self.size, 1)], 1)

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to the residual stream [tokens, width]."""
        return (self.active(x) * self.weights(x)) @ self.down.T


def shared_neurons(parts: Tensor, count: int) -> Tensor:
    """The neurons that every token is to have, ascending: those that fire most often; for an eighth of them
    those of the highest energy, which may be rare.

    Args:
        parts: How much each neuron adds to each token, by length [tokens, neurons].
        count: How many.
    """
    strongest = parts.topk(max(1, parts.shape[1] // STRONGEST)).indices
    often = torch.bincount(strongest.flatten(), minlength=parts.shape[1]).double()
    often += parts.double().mean(0) / (1 + parts.double().mean(0).max())  # less than one token: breaks ties
    loudest = parts.double().square().sum(0).topk(count // 8).indices
    often[loudest] += len(parts) + 1
    return often.argsort(descending=True, stable=True)[:count].sort().values


def co_activation(parts: Tensor) -> Tensor:
    """A unit vector for each neuron [neurons, tokens]: where it adds more than neurons do on average."""
    of_neuron = functional.normalize(parts.T, dim=1)
    return functional.normalize(of_neuron - of_neuron.mean(0), dim=1)


def balanced_clusters(features: Tensor, clusters: int, rng: torch.Generator, rounds: int = 10) -> Tensor:
    """K-means by cosine with clusters of equal size: the cluster of each row [rows].

    Each round gives the rows away greedily, first that pair of row and cluster which gains most over the
    row's mean.
    """
    starts = torch.randperm(len(features), generator=rng)[:clusters].to(features.device)
    centres = features[starts]
    labels = torch.zeros(len(features), dtype=torch.long)
    for _ in range(rounds):
        near = features @ centres.T
        gain = (near - near.mean(1, keepdim=True)).flatten()
        previous, labels = labels, _filled(gain.argsort(descending=True, stable=True).tolist(), *near.shape)
        if torch.equal(previous, labels):
            break
        sums = torch.zeros_like(centres).index_add_(0, labels.to(features.device), features)
        centres = functional.normalize(sums, dim=1)
    return labels


def _filled(order: Iterable[int], rows: int, clusters: int) -> Tensor:
    """Each row's cluster: the first in the order (row · clusters + cluster) that still has room."""
    labels, room = [-1] * rows, [rows // clusters] * clusters
    for pair in order:
        row, cluster = divmod(pair, clusters)
        if labels[row] < 0 and room[cluster]:
            labels[row] = cluster
            room[cluster] -= 1
    return torch.tensor(labels)


def expert_masses(active: Tensor, layer: CarvedLayer) -> Tensor:
    """How much each expert would add, by length [tokens, experts], from the layer's active neurons."""
    size, masses = layer.size, []
    for start in range(layer.shared, active.shape[1], size):
        of = slice(start, start + size)
        # |D h| by the Gram of the expert's own columns: size² a token instead of size · width.
        gram = layer.down[:, of].T @ layer.down[:, of]
        masses.append(((active[:, of] @ gram) * active[:, of]).sum(1).clamp(min=0).sqrt())
    return torch.stack(masses, 1)


def fit_router(x: Tensor, masses: Tensor, top_k: int, rng: torch.Generator, steps: int = 150) -> Tensor:
    """A linear router [experts, width] that chooses those experts that would add most.

    A ridge from the FFN's input to how far an expert's mass lies above the token's mean; then logistic
    regression on the dense model's own choices, the top_k experts of the largest mass, where a mistake counts
    by what is lost.

    Args:
        x: The FFN's input [tokens, width].
        masses: `expert_masses` [tokens, experts].
    """
    experts = masses.shape[1]
    if top_k >= experts:  # nothing to choose
        return torch.zeros(experts, x.shape[1], dtype=x.dtype, device=x.device)
    scale = x.square().mean(0).sqrt().clamp(min=1e-6)
    z = x / scale
    target = (masses - masses.mean(1, keepdim=True)) / masses.std()
    gram = z.T @ z
    gram.diagonal().add_(0.01 * len(z))
    start = torch.linalg.solve(gram, z.T @ target).T
    chosen = torch.zeros_like(masses).scatter_(1, masses.topk(top_k).indices, 1.0)
    fitted = _logistic(z, 3 * start, chosen, masses / masses.mean(), top_k, rng, steps)
    return fitted / scale * (SPREAD / (z @ fitted.T).std(1).mean())


def _logistic(
    z: Tensor, start: Tensor, chosen: Tensor, cost: Tensor, top_k: int, rng: torch.Generator, steps: int
) -> Tensor:
    """Weights that tell chosen experts from others, by how far their logit lies above the token's own cut."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([weight], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(z), (_BATCH,), generator=rng).to(z.device)
            logits = z[rows] @ weight.T
            cut = logits.detach().topk(top_k + 1).values[:, -2:].mean(1, keepdim=True)
            loss = functional.binary_cross_entropy_with_logits(logits - cut, chosen[rows], weight=cost[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return weight.detach()


@dataclass(frozen=True)
class Refit:
    """A down projection, its mean squared error on held-out tokens, and the ridge (None: the old one)."""

    down: Tensor
    error: float
    ridge: float | None


def refit_down(used: Tensor, goal: Tensor, down: Tensor, held: Tensor) -> Refit:
    """Ridge regression toward the old projection, from the neurons as they are used to what shall be added.

    min over D of ‖used Dᵀ − goal‖² + ridge · e · ‖D − down‖², with e the mean energy of a neuron; the ridge,
    or whether to refit at all, by held-out tokens.

    Args:
        used: Neurons times their weights [tokens, neurons].
        goal: What is to be added [tokens, width].
        down: The old projection [width, neurons].
        held: Which tokens are held out [tokens], bool.
    """
    fit, left = used[~held], goal - used @ down.T
    gram, cross = fit.T @ fit, fit.T @ left[~held]
    energy = gram.diagonal().mean()
    best = Refit(down, _error(left[held]), None)
    for ridge in RIDGES:
        damped = gram.clone()
        damped.diagonal().add_(ridge * energy)
        change = torch.linalg.solve(damped, cross)
        error = _error(left[held] - used[held] @ change)
        if error < best.error:
            best = Refit(down + change.T, error, ridge)
    return best


def distil(
    layer: CarvedLayer, x: Tensor, goal: Tensor, held: Tensor, rng: torch.Generator, steps: int
) -> CarvedLayer:
    """All weights of a layer trained by Adam on the squared error of what it adds; the layer as it was where
    held-out tokens are not better off.

    Args:
        x: The FFN's input [tokens, width].
        goal: What is to be added [tokens, width].
        held: Which tokens are held out [tokens], bool.
        steps: Steps of 2048 tokens.
    """
    names = ("gate", "up", "down", *(("router",) if layer.top_k < len(layer.router) else ()))
    weights: dict[str, Any] = {name: torch.nn.Parameter(getattr(layer, name).clone()) for name in names}
    # Steps are relative to what the weights are: the same for wide and narrow models.
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": 0.01 * _rms(weight)} for weight in weights.values()], betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trained = replace(layer, **weights)
    fit, scale = torch.arange(len(x), device=x.device)[~held], goal.square().sum(1).mean()
    with torch.enable_grad():
        for _ in range(steps):
            rows = fit[torch.randint(len(fit), (_BATCH,), generator=rng).to(x.device)]
            loss = (trained(x[rows]) - goal[rows]).square().sum(1).mean() / scale
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    trained_weights: dict[str, Any] = {name: weight.detach() for name, weight in weights.items()}
    done = replace(layer, **trained_weights)
    better = _error(done(x[held]) - goal[held]) < _error(layer(x[held]) - goal[held])
    return done if better else layer


def _rms(values: Tensor) -> float:
    return values.detach().square().mean().sqrt().item()


def _error(left: Tensor) -> float:
    return left.double().square().sum(1).mean().item()
