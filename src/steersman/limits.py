"""What a router lets a plan do: how many experts can be forced in, and how many must stay alive.

The promise of expert steering (an expert at strength 1 is chosen for every token in scope, one at -1 for
none) can only be kept inside these limits, so a plan that breaks one is refused. A soft strength counts by
its sign: at its bound a soft activation ties with a full one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from steersman.showing import count_of


@dataclass(frozen=True)
class Router:
    """One router of a model: how it chooses `top_k` of `experts`, and whether it can be steered.

    `groups` is `(n_group, topk_group)` where only the experts of the best `topk_group` of `n_group` equal
    groups are candidates, else None. `rule` names the routing rule. `reason` says why the router cannot be
    steered; None if it can.
    """

    layer: int
    experts: int
    top_k: int
    rule: str
    groups: tuple[int, int] | None = None
    shared_experts: int = 0
    reason: str | None = None

    @property
    def steerable(self) -> bool:
        """Whether the promise of expert steering can be kept at this router."""
        return self.reason is None

    def group_of(self, expert: int) -> int:
        """The group that an expert belongs to (0 where there are no groups)."""
        return 0 if self.groups is None else expert // (self.experts // self.groups[0])


def broken_limit(router: Router, strengths: Mapping[int, float]) -> str | None:
    """Say which limit the strengths {expert: λ} of one layer break, or None.

    At most k experts activated; activated experts in at most `topk_group` groups; at least k live experts (λ
    ≥ 0) in any groups that routing could pick, or in the layer where there are no groups.
    """
    activated = [expert for expert, strength in strengths.items() if strength > 0]
    dead = {expert for expert, strength in strengths.items() if strength < 0}
    k = router.top_k
    if len(activated) > k:
        return f"{count_of(len(activated), 'expert')} activated, but the router chooses {k}"
    if router.groups is None:
        live = router.experts - len(dead)
        if live < k:
            return f"{live} of {router.experts} experts left alive, but the router chooses {k}"
        return None
    return _broken_group_limit(router, router.groups, strengths, activated, dead)


def _broken_group_limit(
    router: Router,
    groups: tuple[int, int],
    strengths: Mapping[int, float],
    activated: list[int],
    dead: set[int],
) -> str | None:
    n_group, topk_group = groups
    activated_groups = {router.group_of(expert) for expert in activated}
    if len(activated_groups) > topk_group:
        found = count_of(len(activated_groups), "group")
        return f"activated experts in {found}, but the router keeps {topk_group}"
    live = [router.experts // n_group] * n_group
    for expert in dead:
        live[router.group_of(expert)] -= 1
    # Only a full activation is sure to have its group kept; any other groups may fill the remaining places.
    kept = {router.group_of(expert) for expert in activated if strengths[expert] >= 1}
    others = sorted(live[group] for group in range(n_group) if group not in kept)
    worst = sum(live[group] for group in kept) + sum(others[: topk_group - len(kept)])
    if worst < router.top_k:
        return (
            f"{count_of(worst, 'expert')} left alive in {count_of(topk_group, 'group')} that the router "
            f"could keep, but it chooses {router.top_k}"
        )
    return None
