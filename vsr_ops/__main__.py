"""Command line: `python -m vsr_ops upscale | plan | demo | evaluate | embed`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .cli.options import make_parser
from .system.allocator import keep_freed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0, 2 for an error the user can mend, 130 for Ctrl-C."""
    args = make_parser().parse_args(arguments)
    # Torch and the models take seconds to import, which help and a mistyped option need not wait for.
    from .cli.commands import run

    return run(args)


if __name__ == "__main__":
    keep_freed()
    sys.exit(main())
