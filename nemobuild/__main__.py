"""Entry point: run a command, show its error in one place, exit by the table in ``errors``."""

from __future__ import annotations

import os
import sys

from nemobuild.errors import NemobuildError, UsageError


def main() -> None:
    """The ``nemobuild`` command."""
    import typer

    from nemobuild.cli import output
    from nemobuild.cli.app import app

    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="nemobuild", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status or 0)
    except NemobuildError as failure:
        output.error(failure, as_json="--json" in sys.argv)
        sys.exit(failure.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as failure:
        describe = getattr(failure, "format_message", None)  # a wrong flag; each Typer keeps that class elsewhere
        if describe is None:
            raise
        usage = UsageError("usage", describe() or "A command is needed.", next="See `nemobuild --help`.")
        output.error(usage, as_json="--json" in sys.argv)
        sys.exit(usage.exit_status)


if __name__ == "__main__":
    main()
