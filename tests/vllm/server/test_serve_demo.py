"""`make serve-demo`: all that it claims holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from waiting import HANGING


@pytest.mark.long
def test_the_demo_claims_what_holds() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "steersman.vllm.demo"], capture_output=True, text=True, timeout=HANGING
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("  yes  ") == 8
    assert "  NO   " not in done.stdout
    assert "i cannot help with that ." in done.stdout
