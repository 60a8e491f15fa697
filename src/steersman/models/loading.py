"""Opening a model by name: a checkpoint folder, the Hub, or the lab. No remote code, no pickles."""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steersman.chats.setting import set_chat_format
from steersman.errors import ModelError, valid_name
from steersman.models.adapters import check_module
from steersman.models.identity import NAME, WEIGHTLESS, identify_by_files
from steersman.models.source import Source, exists
from steersman.models.stored_tensors import check_settings, is_gguf
from steersman.showing import count_of

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load_model(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    chat_template_arguments: Mapping[str, Any] | None = None,
    chat_date: str | datetime.date | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a causal language model (or a vision-language one) and its tokenizer, in evaluation mode.

    Args:
        name: A checkpoint folder, a name on the Hub, `lab:NAME[@SEED]`, or a GGUF file: `FILE.gguf`,
            `FOLDER#FILE.gguf`, `NAME#FILE.gguf` (a warning says that it is dequantised).
        device: Where to put it, e.g. `cuda` or `cpu`; `auto` spreads it over devices (needs accelerate).
            Default: cuda if there is one.
        dtype: `auto` (the checkpoint's, the default), `float32`, `float16`, `bfloat16`, or a torch dtype.
        revision: Branch, tag or commit on the Hub.
        chat_template: A file with the chat template (or a JSON file with one under `chat_template`), or its
            text. Default: the checkpoint's own.
        chat_template_arguments: What the chat template is given beside the messages, such as
            `{"enable_thinking": False}`.
        chat_date: What a template that asks takes for today, also as YYYY-MM-DD. Default: today.

    Raises:
        ModelError: it does not exist or cannot be opened; no remote code is run and no pickle is read. Or the
            template shows no user's words, uses no such argument, or asks for no date.

    Example:
        >>> model, tokenizer = steersman.load_model("lab:moe")
        >>> model.config.num_experts_per_tok
        4
    """
    name, wanted = valid_name(name, ModelError), _dtype(dtype)
    place = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if place != "auto":
        _check_device(place)
    elif importlib.util.find_spec("accelerate") is None:
        raise ModelError("device 'auto' needs the library accelerate: pip install accelerate")
    chat: dict[str, Any] = {
        "template": chat_template,
        "arguments": chat_template_arguments,
        "date": chat_date,
    }
    if name.startswith("lab:"):
        model, tokenizer = _load_lab(name, place, wanted)
        set_chat_format(tokenizer, **chat)
        return model, tokenizer
    source = Source.of(name, revision)
    if not exists(source.place) and (name.startswith((".", "/", "~")) or source.place.count("/") > 1):
        raise ModelError(f"{name}: no such folder")
    if source.gguf is None and (file := _only_gguf(Path(source.place))) is not None:
        raise ModelError(f"{name}: a folder with a GGUF file; name that too: {name}#{file}")
    if source.gguf is not None and importlib.util.find_spec("accelerate") is None:
        raise ModelError(f"{name}: a GGUF file needs the library accelerate: pip install accelerate")
    options: dict[str, Any] = {**source.options, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.place, **options)
        set_chat_format(tokenizer, **chat)  # before the weights are read
        config = source.config()
        loaded: Any = _auto_class(config).from_pretrained(
            source.place,
            config=config,
            dtype=wanted or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **({"device_map": "auto"} if place == "auto" else {}),
            **options,
        )
        model, info = loaded
        _check_complete(name, info)
        check_settings(source.place, revision)  # downloaded with the weights
        source.mark(model)
        source.tell(model)
        if place != "auto":
            _move(model, place)
    except ModelError:
        raise
    except Exception as error:  # at a damaged checkpoint each of three libraries raises what it likes
        missing = "" if exists(name) else "; nor is there such a folder"
        raise ModelError(f"{name}: cannot be opened as a model ({_first_line(error)}){missing}") from error
    return model.train(False), tokenizer


Named = nn.Module | str | Path
"""A model as it is, or the name that `load_model` takes."""


def open_named(
    model: Named, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to be run, with its tokenizer: both as given, or opened where a name is.

    Raises:
        ModelError: it cannot be opened, or a model is given without its tokenizer.
    """
    if isinstance(model, str | Path):
        found, own = load_model(model)
        return found, own if tokenizer is None else tokenizer
    if isinstance(model, tuple) or tokenizer is None:
        raise ModelError("a model and its tokenizer are wanted, one after the other; or a name, and None")
    return cast("PreTrainedModel", model), tokenizer


def structure_of(model: Named, *, weights: bool = True) -> nn.Module:
    """A model that is not to be run: as given, or its structure where a name is (`load_structure`).

    Raises:
        ModelError: it cannot be opened, or is neither a model nor a name.
    """
    if isinstance(model, str | Path):
        return load_structure(valid_name(model, ModelError), weights=weights)
    check_module(model)
    return model


def load_structure(name: str, *, revision: str | None = None, weights: bool = True) -> PreTrainedModel:
    """Open a model for what it is, not for running it: its layers and its identity, without its weights.

    Weights stay on disk where the checkpoint's safetensors files are at hand, which is all that its identity
    needs; otherwise the model is opened whole.

    Args:
        name: As for `load_model`.
        revision: Branch, tag or commit on the Hub.
        weights: Whether they are needed: without, a folder of nothing but a configuration will do, whose
            weights id is unknown.

    Raises:
        ModelError: it does not exist or cannot be opened.
    """
    if name.startswith("lab:"):
        return load_model(name, device="cpu")[0]
    if not weights and is_without_weights(name):
        try:
            return _structure(name, revision=revision, weights=False)
        except Exception as error:
            raise ModelError(f"{name}: its configuration cannot be read ({_first_line(error)})") from error
    try:
        return _structure(name, revision=revision)
    except Exception as error:
        if is_without_tokenizer(name):  # which opening it whole would ask for
            raise ModelError(f"{name}: cannot be opened as a model ({_first_line(error)})") from error
        # Whatever keeps it from being read this way, opening it whole says best.
        return load_model(name, device="cpu", revision=revision)[0]


def load_local_structure(name: str, *, revision: str | None = None) -> PreTrainedModel:
    """As `load_structure`, of a model whose files are at hand: nothing is downloaded, no weights are read.

    Raises:
        ModelError: they are not.
    """
    if name.startswith("lab:"):
        return load_model(name, device="cpu")[0]
    try:
        return _structure(name, revision=revision, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{name}: is not at hand ({_first_line(error)})") from None


def is_without_weights(name: str) -> bool:
    """Whether a name is a folder with a model's configuration and no weights that could be opened."""
    folder = Path(name)
    return (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*"))


def is_without_tokenizer(name: str) -> bool:
    """Whether a name is a folder with a model's configuration and no file of a tokenizer's vocabulary."""
    folder = Path(name)
    kinds = ("*token*", "vocab*", "*.model", "merges.txt", "tekken.json")
    return (folder / "config.json").is_file() and not any(any(folder.glob(kind)) for kind in kinds)


def _structure(name: str, *, revision: str | None, weights: bool = True, **options: Any) -> PreTrainedModel:
    source = Source.of(name, revision)
    config = source.config(**options)
    with torch.device("meta"):
        model: PreTrainedModel = _auto_class(config).from_config(config, trust_remote_code=False)
    model.train(False)
    if not weights:
        setattr(model, WEIGHTLESS, True)
        return model
    source.mark(model)
    identify_by_files(model)
    return model


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    chat_template_arguments: Mapping[str, Any] | None = None,
    chat_date: str | datetime.date | None = None,
) -> PreTrainedTokenizerBase:
    """Open a model's tokenizer alone.

    Args:
        name: As for `load_model`.
        revision: Branch, tag or commit on the Hub.
        chat_template, chat_template_arguments, chat_date: As for `load_model`.

    Raises:
        ModelError: as `load_model`.
    """
    if name.startswith("lab:"):
        tokenizer = load_model(name, device="cpu")[1]
    else:
        source = Source.of(name, revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.place, trust_remote_code=False, **source.options)
        except Exception as error:
            raise ModelError(f"{name}: its tokenizer cannot be opened ({_first_line(error)})") from error
    set_chat_format(tokenizer, template=chat_template, arguments=chat_template_arguments, date=chat_date)
    return tokenizer


def _auto_class(config: PretrainedConfig) -> Any:
    """What opens a model: a language model, with its vision tower where transformers knows no other way."""
    kind = type(config)
    alone = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if alone else AutoModelForImageTextToText


def _only_gguf(folder: Path) -> str | None:
    """The first GGUF file of a folder that has no configuration; None for another place."""
    try:
        files = sorted(path.name for path in folder.iterdir())
    except (OSError, ValueError):  # no folder, or no name of one
        return None
    return next((name for name in files if is_gguf(Path(name))), None) if "config.json" not in files else None


def _dtype(dtype: str | torch.dtype | None) -> str | torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ModelError(f"dtype {dtype} is none of floating-point numbers: use one of {', '.join(DTYPES)}")
    return dtype


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers: that is not the model it names."""
    lacking = sorted(
        {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    )
    if lacking:
        raise ModelError(
            f"{name}: its weights do not fit its configuration "
            f"({count_of(len(lacking), 'tensor')} missing or of another shape, such as {lacking[0]})"
        )


def _load_lab(
    name: str, place: str, wanted: str | torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from steersman import lab

    plain, at, seed = name.removeprefix("lab:").partition("@")
    if at and not (seed.isdecimal() and int(seed) < 2**32):
        raise ModelError(f"{name}: the seed after @ is a whole number below 2^32, as in lab:moe@1")
    model, tokenizer = lab.load(plain, seed=int(seed or 0), progress=True)
    setattr(model, NAME, name)
    tokenizer.name_or_path = name
    if isinstance(wanted, torch.dtype):
        _move(model, wanted)
    _move(model, "cpu" if place == "auto" else place)
    return model.train(False), tokenizer


def _move(model: nn.Module, where: str | torch.dtype) -> None:
    """Move a model in place to a device or dtype (transformers' own `to` is not typed)."""
    model.to(where)


def _check_device(place: str) -> None:
    try:
        device = torch.device(place)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {place!r} cannot be used here ({_why_no_device(error)})") from None
    if device.type == "meta":
        raise ModelError("device 'meta' cannot be used here (it holds no numbers)")


def _why_no_device(error: BaseException) -> str:
    """torch's reason; for a name that it does not know, the names that are right."""
    reason = _first_line(error)
    return _DEVICES if "device string" in reason else reason


_DEVICES = "right is cpu, cuda, cuda:1, mps, or auto to spread over devices"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
