"""An engine in this process for a command: opened, given plans as they are needed, asked, closed."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.errors import ServingError, SteersmanError
from steersman.steering import Steering
from steersman.vllm.read_text import ReadText
from steersman.vllm.registry import ASKED, Registry
from steersman.vllm.serveable import LAB, check_heads, check_installed, folder_of
from steersman.vllm.settings import KEY

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steersman.models.apply import Match

PLANS = 64
"""Plans that fit in at a time: those of the arms of an evaluation, and some random ones."""
_DECIDED = ("model", "tokenizer", "revision", "dtype", "additional_config")


class Engine:
    """An engine, the model that it runs as transformers knows it, and its plans.

    Args:
        llm: `vllm.LLM`, configured to be steered or to count.
        model: The model without weights: its structure and its identity.
        tokenizer: Its tokenizer.
    """

    def __init__(self, llm: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.llm, self.model, self.tokenizer = llm, model, tokenizer
        registry: Registry | None = getattr(llm.llm_engine.input_processor, KEY, None)
        if registry is None:
            raise ServingError(
                'this engine is not steered: open it with additional_config={"steersman": {…}}'
            )
        self.registry = registry
        self._names: dict[str, str] = {
            f"{one.steering.fingerprint}": one.name for one in self.registry.names()
        }
        """Fingerprint → name, what was needed last at the end."""
        self._made = 0

    @property
    def dtype(self) -> str:
        """The number format that the engine computes in."""
        return str(self.llm.llm_engine.vllm_config.model_config.dtype)

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return int(self.llm.llm_engine.vllm_config.model_config.max_model_len)

    def name_of(self, steering: Steering) -> str:
        """The name that requests ask for a plan by; the plan is written into the bank where it is not there.

        Raises:
            ServingError: the engine has no room for a plan of this form.
            ArchitectureMismatch, WeightsMismatch: it is for another model.
        """
        key = steering.fingerprint
        if key in self._names:
            self._names[key] = self._names.pop(key)
            return self._names[key]
        if len(self._names) >= self.registry.settings.max_steerings:
            oldest = next(iter(self._names))  # nobody follows it: each call of `ask` waits for its answers
            self.registry.remove(self._names.pop(oldest))
        slot = self.registry.reserve(steering)
        try:
            self._write(slot, steering)
        except BaseException:
            self.registry.give_up(slot)
            raise
        self._made += 1
        name = f"plan-{self._made}"
        self.registry.publish(name, slot, steering, "this process")
        self._names[key] = name
        return name

    def _write(self, slot: int, steering: Steering) -> None:
        with tempfile.TemporaryDirectory() as folder:
            steering.save_pretrained(folder, force=True)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        for reason in self.llm.collective_rpc("steersman_write", args=(slot, files)):
            if reason is not None:
                raise ServingError(reason)

    def ask(
        self,
        ids: Sequence[Sequence[int]],
        plans: Sequence[Steering | None],
        settings: Sequence[Any],
        *,
        prompts: Sequence[int] | None = None,
    ) -> list[Any]:
        """The engine's outputs, in order; each prompt may have a plan of its own.

        Args:
            ids: Token ids of each prompt.
            plans: What each is steered by; None: nothing.
            settings: vLLM's `SamplingParams` of each.
            prompts: Where answers are given and only read: how many of the ids are prompt.
        """
        outputs: list[Any] = []
        for part in self._in_parts(plans):
            read = [None] * len(ids[part]) if prompts is None else [ReadText(one) for one in prompts[part]]
            asked = [
                self._told(params, plan, text)
                for params, plan, text in zip(settings[part], plans[part], read, strict=True)
            ]
            outputs += ask(self.llm, ids[part], asked)
        return outputs

    def _told(self, params: Any, plan: Steering | None, read: ReadText | None) -> Any:
        own = params.clone()
        own.extra_args = {ASKED: "none" if plan is None or not plan.edits else self.name_of(plan)}
        if read is not None:
            own.extra_args[KEY] = read
        return own

    def _in_parts(self, plans: Sequence[Steering | None]) -> Iterator[slice]:
        """Parts of a sequence of requests, of which each has no more plans than fit in at a time."""
        start, held = 0, set[str]()
        for number, plan in enumerate(plans):
            key = plan.fingerprint if plan is not None and plan.edits else ""
            if key not in held and len(held - {""}) >= self.registry.settings.max_steerings:
                yield slice(start, number)
                start, held = number, set()
            held.add(key)
        yield slice(start, len(plans))

    def close(self) -> None:
        """Let go of the engine, its memory and its processes."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def ask(llm: Any, ids: Sequence[Sequence[int]], settings: Sequence[Any]) -> list[Any]:
    """An engine's outputs for prompts of token ids, in order."""
    if not ids:
        return []
    engine = llm.llm_engine
    try:
        given = [{"prompt_token_ids": list(prompt)} for prompt in ids]
        return llm.generate(given, list(settings), use_tqdm=False)  # type: ignore[no-any-return]
    except BaseException:  # whoever goes on with this engine must not meet what was left of this
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        raise


@contextmanager
def opened_engine(
    name: str,
    *,
    steerings: Mapping[str, Steering] | None = None,
    count: int = 0,
    all_sites: bool = False,
    match: Match = "weights",
    dtype: str | None = None,
    revision: str | None = None,
    most_at_once: int | None = None,
    chat: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Engine]:
    """Open a model in an engine, and close it in the end.

    Args:
        name: A folder, a name on the Hub, or `lab:NAME[@SEED]`.
        steerings: Plans that are there from the start; they decide where later ones may edit.
        count: Texts whose experts can be counted at a time; 0: none.
        all_sites: Let later plans edit anywhere.
        match: Whether only the weights a plan was made for are taken, or any of its architecture.
        dtype: As of `load_model`.
        revision: Branch, tag or commit on the Hub.
        most_at_once: Requests that run at a time; None: as many as the engine likes.
        chat: How chats are rendered, as `load_model` takes it.
        options: Further arguments of `vllm.LLM`.

    Raises:
        ServingError: vLLM is not installed, or does not open the model.
        ModelError: it cannot be opened.
    """
    _tame()
    check_installed()
    folder = folder_of(name)
    model, tokenizer = _known(name, folder, revision, chat or {})
    with tempfile.TemporaryDirectory() as place, _quiet():
        settings: dict[str, Any] = {
            "steerings": _saved(steerings or {}, Path(place)),
            "count": count,
            "sites": "all" if all_sites else "plans",
            "max_steerings": PLANS,
            "match": match,
        }
        given: dict[str, Any] = {
            "dtype": _dtype(model, folder, revision) if dtype in (None, "auto") else dtype,
            "revision": revision,
            "disable_log_stats": True,
            "skip_tokenizer_init": True,
            "use_tqdm_on_load": False,
            **({} if most_at_once is None else {"max_num_seqs": most_at_once}),
            **checked_options(options or {}),
            "additional_config": {KEY: settings},
        }
        engine = Engine(_opened(name, folder, revision, given), model, tokenizer)
    try:
        yield engine
    finally:
        with suppress(Exception):  # what went wrong before is what matters
            engine.close()


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for `vllm.LLM`. Raises `ServingError` for one that it has not, or that is decided elsewhere."""
    from dataclasses import fields

    from vllm import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    for name in options:
        if name in _DECIDED:
            raise ServingError(f"engine option {name}: this is decided by the command's own options")
        if name not in known:
            raise ServingError(f"engine option {name}: vLLM has none of this name")
    return dict(options)


def structure_of(folder: str, revision: str | None) -> PreTrainedModel:
    """A model without weights, with what its checkpoint says of generating."""
    from transformers import GenerationConfig

    from steersman.models.loading import load_structure
    from steersman.models.stored_tensors import check_settings

    model = load_structure(folder, revision=revision)
    with suppress(OSError):  # most say nothing
        model.generation_config = GenerationConfig.from_pretrained(folder, revision=revision or "main")
    check_settings(folder, revision)
    return model


def _known(name: str, folder: str, revision: str | None, chat: Mapping[str, Any]) -> tuple[Any, Any]:
    from steersman.models.identity import NAME
    from steersman.models.loading import load_tokenizer

    model = structure_of(folder, revision)
    if name.startswith(LAB):
        setattr(model, NAME, name)
    return model, load_tokenizer(name, revision=revision, **chat)


def _dtype(model: Any, folder: str, revision: str | None) -> str:
    """The checkpoint's number format: vLLM would halve float32."""
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(folder, revision=revision).get_text_config().dtype
    return str(found or "float32").removeprefix("torch.")


def _saved(steerings: Mapping[str, Steering], place: Path) -> dict[str, str]:
    for name, steering in steerings.items():
        steering.save_pretrained(place / name)
    return {name: str(place / name) for name in steerings}


def _opened(name: str, folder: str, revision: str | None, given: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    from steersman.vllm.plugin import register

    register()
    check_heads(name, folder, revision)
    if current_platform.is_cpu():  # compiling takes longer there than most commands
        given = {"enforce_eager": True, "gpu_memory_utilization": _free_memory() / 2, **given}
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        return LLM(folder, **given)
    except SteersmanError:
        raise
    except Exception as error:  # a worker of several may fail with any
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ServingError(f"vLLM does not open {name}: {reason}") from error


def _free_memory() -> float:
    """The free share of the host's memory, of which the engine would take nearly all."""
    import psutil  # type: ignore[import-untyped]

    memory = psutil.virtual_memory()
    return float(memory.available / memory.total)


def _tame() -> None:
    """Before the engine is imported: it says what goes wrong, on stderr, and takes our plugin."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "steersman" not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, [allowed, "steersman"]))


@contextmanager
def _quiet() -> Iterator[None]:
    """What the engine and its processes print goes to stderr."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
