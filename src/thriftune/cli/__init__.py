"""The verbs. Nothing heavy is imported here: each verb imports what it needs when it runs, so `--help` is instant.

Results go to standard output, everything else to standard error. With `--json` standard output holds one JSON object.
"""

from __future__ import annotations

import os
import sys

from thriftune.cli import comparing, federating, planning, training, using
from thriftune.cli.app import app
from thriftune.errors import StoppedBySignal, ThriftuneError

__all__ = ["app", "comparing", "federating", "main", "planning", "training", "using"]


def _let_segments_grow() -> None:
    """PyTorch's expandable segments, unless the user has set the allocator: measured on an H200, it then takes 0.3 to
    2 % more from the driver than it hands out, instead of 3 to 8 %."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        for name in names:
            os.environ[name] = "expandable_segments:True"


def main() -> None:
    """The console script: an error of ours is three lines on standard error and its exit code, never a traceback."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _let_segments_grow()
    try:
        app()
    except ThriftuneError as error:
        word = "stopped" if isinstance(error, StoppedBySignal) else "error"
        print(f"{word}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped at once: nothing more was saved", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
