"""A stand-in for Open MPI's ``mpirun``: ``-n COUNT PROGRAM ARGUMENTS`` parts with ``:`` between them, on one machine.

As the real one it puts every rank into a process group of its own, hands SIGTERM on, and ends all when one fails.
"""

import os
import signal
import subprocess
import sys

words = sys.argv[1:]
if os.getuid() == 0 and "--allow-run-as-root" not in words:
    raise SystemExit("mpirun has detected an attempt to run as root.")
words = [word for word in words if word != "--allow-run-as-root"]
parts = [[]]
for word in words:
    if word == ":":
        parts.append([])
    else:
        parts[-1].append(word)
lines = []
for part in parts:
    if part[0] != "-n":
        raise SystemExit(f"mpirun: unrecognized argument {part[0]}")
    lines += [part[2:]] * int(part[1])
ranks = [
    subprocess.Popen(
        line,
        env=os.environ | {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(len(lines))},
        preexec_fn=os.setpgrp,
    )
    for rank, line in enumerate(lines)
]
signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
pid, status = os.wait()
for rank in ranks:
    if rank.pid != pid:
        rank.terminate()
        rank.wait()
raise SystemExit(os.waitstatus_to_exitcode(status) & 0xFF)
