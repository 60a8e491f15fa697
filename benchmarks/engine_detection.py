"""What detection on vLLM costs: against plain prefill of the same prompts in the same engine.

Ratios are of throughput, so 1 is free. The rival generates one token after each prompt, as detection does; no
prompt is served from the prefix cache for either. Beside it stands the noise, the rival against itself, and
vLLM's own way of telling which experts a token used, `--enable-return-routed-experts`, where it runs.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before vLLM is imported: one process, whose thread does all the work, and whose time is measured.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
from detection import WORDS, model, tokenizer
from measuring import interleaved, options, ratio, report

from steersman import ContrastPair, ContrastPairs

PAIRS, LENGTH, TARGET = 48, 96, 32
PLACES = 2 * PAIRS


def pairs() -> ContrastPairs:
    """Chats whose last third is the target; no two begin alike."""
    random = np.random.default_rng(0)

    def side() -> list[dict[str, str]]:
        words = [WORDS[number] for number in random.integers(0, len(WORDS), LENGTH)]
        said, answer = " ".join(words[:-TARGET]), " ".join(words[-TARGET:])
        return [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]

    return ContrastPairs([ContrastPair(side(), side()) for _ in range(PAIRS)])


@contextmanager
def engine(folder: str, **more: Any) -> Iterator[Any]:
    """vLLM in this process, without a prefix cache."""
    from vllm import LLM

    llm = LLM(
        folder,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        gpu_memory_utilization=0.3,
        **more,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def prefill(llm: Any, ids: list[list[int]]) -> list[Any]:
    """Read prompts, and write one token after each."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": one} for one in ids], settings, use_tqdm=False)


def main() -> None:
    given = options(__doc__.splitlines()[0])
    if importlib.util.find_spec("vllm") is None:
        print("detection on the engine: not measured, vLLM is not installed here")
        return
    from steersman.experts.counting_options import options_of
    from steersman.experts.encoding import counted_tokens
    from steersman.models.encoding import EncodedPairs
    from steersman.vllm.detection import InEngine, detect_experts

    chosen, rounds = pairs(), given.rounds or 15
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place) / "model")
        model().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        counting = {"additional_config": {"steersman": {"count": PLACES}}}
        with engine(folder, **counting) as llm:
            reader = InEngine(llm, None, None)
            how = options_of("token", "target", 0, None, 0, None, batch_size=1, truncate=False)
            encoded = EncodedPairs(
                reader.model, chosen, counted_tokens(reader.model, reader.tokenizer, how.counted)
            )
            window = list(encoded)
            ids = [pair.ids[side].tolist() for pair in window for side in (0, 1)]
            times = interleaved(
                {
                    "plain": lambda: prefill(llm, ids),
                    "again": lambda: prefill(llm, ids),
                    "counting": lambda: reader.count(window, how),
                    "detection": lambda: detect_experts(
                        llm, chosen, model=reader.model, tokenizer=reader.tokenizer
                    ),
                },
                rounds,
                warm=2,
            )
            device = llm.llm_engine.vllm_config.device_config.device_type
        own = returned(folder, ids, rounds)
    plain = times["plain"]
    ratios = [
        ratio("detection of texts that are tokenized", plain, times["counting"], bound=0.95),
        ratio("detection, with rendering and statistics", plain, times["detection"]),
        ratio("the same prefill once more (noise)", plain, times["again"]),
    ]
    if isinstance(own, str):
        told = f"--enable-return-routed-experts is not measured: {own}"
    else:
        ratios.append(ratio("vLLM's --enable-return-routed-experts", own["plain"], own["returned"]))
        told = "vLLM's own way is measured in an engine of its own"
    report(
        f"Detection on vLLM against plain prefill: throughput, {2 * PAIRS} texts of {LENGTH} words, {device}",
        ratios,
        notes=told,
        name="engine_detection",
        save=given.save,
    )


def returned(folder: str, ids: list[list[int]], rounds: int) -> dict[str, list[float]] | str:
    """Seconds of prefill with and without vLLM's own counting, or why it does not run."""
    try:
        with engine(folder, enable_return_routed_experts=True) as llm:
            (first,) = prefill(llm, ids[:1])
            if getattr(first, "prompt_routed_experts", first.outputs[0].routed_experts) is None:
                return "this build takes the option and returns nothing"
            own = interleaved({"returned": lambda: prefill(llm, ids)}, rounds)
        with engine(folder) as llm:
            return own | interleaved({"plain": lambda: prefill(llm, ids)}, rounds)
    except Exception as error:  # whatever keeps it from running here
        told = " ".join(str(error).split()) or type(error).__name__
        return told.partition("Value error, ")[2].partition(" [type=")[0] or told[:200]


if __name__ == "__main__":
    main()
