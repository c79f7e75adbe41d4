"""Command line: `python -m vsr_ops upscale | plan | demo | evaluate | embed`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from .cli.options import make_parser
from .system.allocator import keep_freed
from .system.lean import lean


def main(arguments: Sequence[str] | None = None, alone: bool = False) -> int:
    """Runs a command; the exit code: 0, 2 for an error the user can mend, 130 for Ctrl-C. `alone`: the process is this
    command's own, and imports no more than it needs."""
    args = make_parser().parse_args(arguments)
    # Torch and the models take seconds to import, which help and a mistyped option need not wait for.
    try:
        with lean() if alone else nullcontext():
            from .cli.commands import run
    except (ImportError, AttributeError):
        # A library that does not do without: slower, or the error itself.
        from .cli.commands import run

    return run(args)


if __name__ == "__main__":
    keep_freed()
    sys.exit(main(alone=True))
