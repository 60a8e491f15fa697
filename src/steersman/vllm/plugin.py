"""The plugin's entry point (`vllm.general_plugins`): called in every process of the engine."""

from __future__ import annotations


def register() -> None:
    """Extend the engine's classes where they meet requests, steps and the prefix cache.

    An engine that is not configured with `additional_config={"steersman": …}` runs as without the plugin,
    except that it refuses a request that asks for a steering.

    Raises:
        ServingError: the engine is of a version that is not known, or its seams are not those of one that is.
    """
    from steersman.vllm.signatures import check_version

    check_version()  # first: of another version what is imported below may not be there

    from steersman.vllm.beam_search import extend_beam_search
    from steersman.vllm.front_end import extend_front_end
    from steersman.vllm.prefix_cache import extend_prefix_cache
    from steersman.vllm.runner_v1 import extend_runner
    from steersman.vllm.server.app import extend_server
    from steersman.vllm.worker import extend_workers

    extend_prefix_cache()
    extend_front_end()
    extend_beam_search()
    extend_server()
    extend_runner()
    extend_workers()
