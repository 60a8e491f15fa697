"""`steersman-lm-eval`: the command of lm-evaluation-harness, which then knows the model `steersman`.

Versions of the harness that ask installed packages for models find it by themselves (entry point
`lm_eval.models`); those until 0.4.13 know only their own, so that the model has to be imported first.
"""

from __future__ import annotations

import sys

from steersman.cli.failures import reported
from steersman.errors import ModelError, how_to_install


def main() -> None:
    """Run `lm_eval` with the arguments of this process; a user's error is one line and exit status 2."""
    sys.exit(reported(_run))


def _run() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        absent = (error.name or "").partition(".")[0] == "lm_eval"
        what = "is not installed" if absent else f"cannot be imported ({error})"
        raise ModelError(f"lm-eval {what}; {how_to_install('harness')}") from None
    import steersman.harnesses.lm_eval  # noqa: F401 registers the model

    cli_evaluate()


if __name__ == "__main__":
    main()
