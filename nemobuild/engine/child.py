"""Become another program, which ends when its starter ends: ``python child.py STARTER STACK_BYTES PROGRAM ARGUMENT...``

A program of its own, since what Python runs between fork and exec may wait for ever for a lock that another thread held
at the fork, and the one who started it with it. STACK_BYTES 0 leaves the stack as it is.
"""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    starter, stack_bytes, *program = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(starter):  # it has ended before it could be said
        sys.exit(1)
    if wanted := int(stack_bytes):
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(
            resource.RLIMIT_STACK, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"error: cannot start {program[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
