"""What an engine may be configured with, and still keep every plan's promise."""

from __future__ import annotations

from typing import Any

from vllm import envs

from steersman.errors import ServingError


def check_supported(vllm_config: Any) -> None:
    """Raise `ServingError` where a configuration moves tokens to where their plans are unknown."""
    for wrong, why in _unsupported(vllm_config):
        if wrong:
            raise ServingError(f"this engine cannot be steered: {why}")


def _unsupported(config: Any) -> list[tuple[bool, str]]:
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    passes = config.compilation_config.pass_config
    speculative = config.speculative_config
    return [
        (model.runner_type != "generate", f"it runs {model.runner_type}, not generation"),
        (bool(model.is_encoder_decoder), "encoder-decoder models have two streams"),
        (
            speculative is not None and speculative.method not in ("ngram",),
            f"speculative decoding by {getattr(speculative, 'method', None)!r} drafts with a model that no "
            "plan is made for; n-gram drafting is exact",
        ),
        (
            bool(getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0)),
            "micro-batches (--enable-dbo) split a step's tokens",
        ),
        (
            bool(
                getattr(passes, "enable_sp", False)
                or getattr(parallel, "enable_hc_sp", False)
                or parallel.use_sequence_parallel_moe
            ),
            "sequence parallelism spreads tokens over ranks",
        ),
        (
            bool(getattr(parallel, "enable_elastic_ep", False)),
            "elastic expert parallelism makes workers anew that know no plans",
        ),
        (
            bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False)),
            "its front end in Rust (VLLM_USE_RUST_FRONTEND) reads no steering",
        ),
        (
            getattr(config, "diffusion_config", None) is not None,
            "diffusion computes a token several times over",
        ),
        (
            getattr(config, "weight_transfer_config", None) is not None,
            "weights that change while it runs (--weight-transfer-config) are not those of the plans",
        ),
        (
            config.kv_transfer_config is not None,
            "a KV connector (--kv-transfer-config) hands over keys and values by their tokens alone, "
            "whatever steering they were computed under",
        ),
        (
            bool(getattr(model, "enable_sleep_mode", False)),
            "sleep mode discards what is on the device, and the plans with it",
        ),
        (
            bool(getattr(cache, "kv_sharing_fast_prefill", False)),
            "--kv-sharing-fast-prefill skips prompt tokens in some layers",
        ),
        (
            any(getattr(parallel, name, 1) > 1 for name in _CONTEXT_PARALLEL),
            "context parallelism spreads a prompt's tokens over ranks",
        ),
    ]


_CONTEXT_PARALLEL = ("decode_context_parallel_size", "prefill_context_parallel_size")
