"""Entry point: run a command, show its error in one place, exit by the table in ``errors``."""

from __future__ import annotations

import sys

from nemobuild.errors import NemobuildError


def main() -> None:
    """The ``nemobuild`` command."""
    from nemobuild.cli import output
    from nemobuild.cli.app import app

    try:
        app()
    except NemobuildError as failure:
        output.error(failure, as_json="--json" in sys.argv)
        sys.exit(failure.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away; there is nobody to tell
        sys.exit(141)


if __name__ == "__main__":
    main()
