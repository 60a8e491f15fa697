"""Plans that come and go while requests run: written into every worker first, then named, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from steersman.errors import ServingError
from steersman.steering import Steering
from steersman.vllm.registry import Registry
from steersman.vllm.server.plan_files import open_files


class Changes:
    """Changes a running engine's plans, one at a time.

    A plan is written into a slot that no request follows. Only when every worker has it do requests find it
    under its name; those that follow the one before keep it to their end.

    Args:
        engine: The engine's client.
        registry: Its register.
    """

    def __init__(self, engine: Any, registry: Registry) -> None:
        self._engine, self._registry = engine, registry
        self._one_at_a_time = asyncio.Lock()

    def check_possible(self) -> None:
        """Raise `ServingError` where plans cannot be changed while the engine runs."""
        parallel = self._engine.vllm_config.parallel_config
        if getattr(parallel, "_api_process_count", 1) > 1:
            raise ServingError(
                "this server runs as several processes, and each would know other plans: start it with "
                "--api-server-count 1 to change plans while it runs"
            )
        if not self._registry.settings.active:
            raise ServingError("this engine was started without steerings and without --sites all")

    async def put(self, name: str, files: Mapping[str, bytes], new: bool) -> tuple[Steering, bool]:
        """Add a plan, or put it in the place of the one that has its name.

        Args:
            name: What requests will ask for.
            files: The files of its folder.
            new: Whether there must be none of this name.

        Returns:
            The plan, and whether it took another's place.

        Raises:
            RequestError: it cannot be opened.
            ArchitectureMismatch, WeightsMismatch: it is for another model.
            ServingError: the workers cannot take it, or there is no room.
            FileExistsError: there is one of this name, and `new` is set.
        """
        steering = await asyncio.to_thread(open_files, files)
        async with self._one_at_a_time:
            replaced = any(one.name == name for one in self._registry.names())
            if replaced and new:
                raise FileExistsError(name)
            slot = await asyncio.to_thread(self._registry.reserve, steering)
            try:
                await self._write(slot, files)
            except BaseException:
                await self._everywhere("steersman_clear", slot)
                self._registry.give_up(slot)
                raise
            self._registry.publish(name, slot, steering, "the network")
        return steering, replaced

    async def remove(self, name: str) -> None:
        """Take a name away. Raises `RequestError` and `ServingError` as `Registry.remove`."""
        async with self._one_at_a_time:
            self._registry.remove(name)

    async def set_default(self, default: str | None) -> None:
        """Change what requests get that ask for nothing. Raises `RequestError`."""
        async with self._one_at_a_time:
            self._registry.with_default(default)

    async def _write(self, slot: int, files: Mapping[str, bytes]) -> None:
        reasons = await self._everywhere("steersman_write", slot, dict(files))
        why = next((reason for reason in reasons if reason is not None), None)
        if why is not None:
            raise ServingError(str(why))

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker of every engine; their results."""
        core = self._engine.engine_core
        if hasattr(core, "call_utility_all_async"):
            engines = await core.call_utility_all_async("collective_rpc", method, None, args, {})
            return [result for workers in engines for result in workers]
        parallel = self._engine.vllm_config.parallel_config
        if parallel.data_parallel_size > 1:  # the client then tells what the first of its engines answers
            raise ServingError("this version of vLLM cannot change plans of several data-parallel engines")
        return list(await self._engine.collective_rpc(method, args=args))
