"""Preparing one worker: its sites are found, the operations put in place, the first plans written."""

from __future__ import annotations

from typing import Any

from torch import nn

from steersman.errors import ServingError
from steersman.showing import count_of
from steersman.vllm import ops
from steersman.vllm.bank import Bank, Places, Room
from steersman.vllm.counting import Counter
from steersman.vllm.first_plans import first_plans
from steersman.vllm.plan_rows import most_steps, rows_of, sites_of
from steersman.vllm.settings import Settings, read_settings
from steersman.vllm.sites import Sites, attach, attach_counting, find_sites
from steersman.vllm.supported import check_supported
from steersman.vllm.worker_state import WorkerState

LEAST_VECTORS = 512


def prepare_worker(model: nn.Module, vllm_config: Any, device: Any) -> WorkerState | None:
    """Put the operations into a model that has been loaded, before it is compiled or captured.

    Returns:
        What the worker knows; None where the engine is not configured to be steered.

    Raises:
        ServingError: a plan cannot be kept here, and why.
    """
    settings = read_settings(vllm_config.additional_config)
    if settings is None or not settings.active:
        return None
    check_supported(vllm_config)
    plans = first_plans(settings)
    config = vllm_config.model_config.hf_text_config
    found = find_sites(model, config)
    sites = _sites(found, settings, list(plans.values()), config.num_hidden_layers)
    places = sites.places
    bank = Bank(places, _room(vllm_config, settings, places, list(plans.values())), device)
    for slot, plan in enumerate(plans.values()):
        bank.write(slot, rows_of(plan), plan.fingerprint)
    state = _state(bank, frozenset(found.blocks))
    vllm_config.compilation_config.static_forward_context[ops.CONTEXT_KEY] = state
    attach(sites, device)
    if settings.count:
        counted = found.counted()
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        if counted:
            state.counter = Counter([site.place for site in counted], settings.count, tokens, device)
        attach_counting(counted, device)
    return state


def _state(bank: Bank, layers: frozenset[int]) -> WorkerState:
    if bank.device.type == "cpu":
        return WorkerState(bank, layers)
    from steersman.vllm.device_state import DeviceState  # needs Triton, which is not everywhere

    return DeviceState(bank, layers)


def _sites(found: Sites, settings: Settings, plans: list[Any], layers: int) -> Sites:
    routers: set[int] = set()
    blocks: set[int] = set()
    for plan in plans:
        of_routers, of_blocks = sites_of(plan)
        routers |= of_routers
        blocks |= of_blocks
    beyond = [layer for layer in sorted(routers | blocks) if layer >= layers]
    if beyond:  # what is configured may be another model than what its files say
        there = count_of(layers, "layer")
        raise ServingError(f"a steering edits layer {beyond[0]}; the engine's model has {there}")
    named = found.chosen(routers, blocks)  # raises where one of them cannot be had
    return found.chosen(None, None) if settings.sites == "all" else named


def _room(vllm_config: Any, settings: Settings, places: Places, plans: list[Any]) -> Room:
    vectors = sum(
        len({id(step) for row in rows_of(plan) for steps in row.steps.values() for step in steps})
        for plan in plans
    )
    if settings.max_vectors and vectors > settings.max_vectors:
        raise ServingError(f"{vectors} vectors do not fit: max_vectors is {settings.max_vectors}")
    return Room(
        plans=settings.max_steerings,
        vectors=(settings.max_vectors or max(2 * vectors, LEAST_VECTORS)) + len(places.blocks),
        # A plan that is added later may add a vector and take a direction out.
        slots=max([2 if settings.sites == "all" else 1, *map(most_steps, plans)]),
        components=settings.max_per_request,
        tokens=vllm_config.scheduler_config.max_num_batched_tokens,
    )
