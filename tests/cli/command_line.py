"""Running the command line in this process or in one of its own, on small checkpoints and pairs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

from steersman.cli import main
from waiting import HANGING

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = [
    "Question: who wrote the book? Document: The book was written by a teacher in the north.",
    "Answer: the teacher. The river is long, and the town beside it is old.",
]


@dataclass(frozen=True)
class Run:
    """What a command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; anything else there, or on stderr, is an error."""
        assert self.status == 0, self.stderr
        assert self.stdout.count("\n") == 1, self.stdout
        assert self.remarks == ""
        result: dict[str, Any] = json.loads(self.stdout)
        return result

    @property
    def words(self) -> str:
        assert self.status == 0, self.stderr
        assert self.remarks == ""
        return self.stdout

    @property
    def remarks(self) -> str:
        """What is on stderr beside progress bars, which come where the machine is slow."""
        return re.sub(r"\r[^\n]*?(?=\r|\n|$)\n?", "", self.stderr)

    @property
    def error(self) -> str:
        """The one line of a user's error."""
        assert self.status == 2, self.stdout + self.stderr
        assert self.stdout == ""
        assert self.remarks.startswith("steersman: error: ")
        assert self.remarks.count("\n") == 1, self.stderr
        return self.remarks.removeprefix("steersman: error: ").strip()


def run(*arguments: object, stdin: str | bytes = "") -> Run:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    piped = io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin))
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", piped):
        status = main([str(argument) for argument in arguments])
    return Run(status, out.getvalue(), err.getvalue())


def process(*arguments: object, **options: Any) -> Run:
    """The command line as it is installed, in a process of its own."""
    command = [str(Path(sys.executable).with_name("steersman")), *map(str, arguments)]
    done = subprocess.run(command, text=True, timeout=HANGING, **{"capture_output": True, **options})
    return Run(done.returncode, done.stdout or "", done.stderr or "")


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"],
    )
    backend.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT if chat else None
    return fast


def save_tiny(
    folder: Path, *, seed: int = 0, experts: int = 8, context: int = 2048, chat: bool = True
) -> Path:
    """A random Mixture-of-Experts checkpoint: 3 layers, 2 of its experts a token."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=context,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
        initializer_range=0.3,  # so that experts make a difference
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder


def write_pairs(path: Path, numbers: range) -> Path:
    rows = [
        {
            "positive": [
                {"role": "user", "content": f"Question {number}: who wrote the book?"},
                {"role": "assistant", "content": "the teacher" + " of the town" * (number % 3)},
            ],
            "negative": [
                {
                    "role": "user",
                    "content": f"The river is {number} miles long, and the town beside it is old.",
                }
            ],
        }
        for number in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
