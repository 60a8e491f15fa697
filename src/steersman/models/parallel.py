"""Models shared by several processes: where a process is kept from seeing what its routers choose."""

from __future__ import annotations

from torch import nn

HIDDEN = (
    "expert parallelism hides its choice (style ep_router of older transformers): share the experts by "
    "ep_dispatch_experts, or use a later transformers"
)


def hides_choices(model: nn.Module) -> bool:
    """Whether routers give each process the ids of its own experts only, masked and counted anew."""
    sharing = getattr(getattr(model, "config", None), "distributed_config", None)
    plan = getattr(model, "_ep_plan", None) or {}
    return getattr(sharing, "ep_size", 1) > 1 and "ep_router" in plan.values()
