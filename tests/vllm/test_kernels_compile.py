"""The kernels compile for a GPU, which takes Triton and no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# Not imported here: another file wants Triton to interpret.
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here: the kernels are compiled where it is", allow_module_level=True)

COMPILED = """
import json, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from steersman.vllm import kernels, routing_kernel  # noqa: E402

TYPES = dict(
    site="*i32", token_rows="*i32", token_strengths="*fp32", table="*fp32", softmax_first="*i32", ran="*i32",
    factor="fp32", weights="*fp32", ids="*i32", rules="*i32", scaling="*fp32", bias="*fp32",
    vector_ids="*i32", shares="*fp32", vectors="*fp32", scores="*bf16", hidden="*bf16", residual="*bf16",
)
sizes = {}
for kernel, constants in (
    (kernels._edit_scores, dict(block=128)),
    (kernels._edit_states, dict(block=2048, has_residual=True)),
    (routing_kernel._choose, dict(block=256, chosen_block=8)),
):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    sizes[kernel.__name__] = len(compiled.asm["cubin"])
print(json.dumps(sizes))
"""


def test_the_kernels_compile_for_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    sizes = json.loads(ran.stdout)
    assert set(sizes) == {"_edit_scores", "_edit_states", "_choose"}
    assert all(size > 1000 for size in sizes.values())
