"""A stand-in for ``trtllm-llmapi-launch``: rank 0 runs the program without MPI's variables, the others wait."""

import os
import signal
import sys

if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) > 0:
    signal.pause()
environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PMI_"))}
environment["TLLM_SPAWN_PROXY_PROCESS"] = "1"
os.execvpe(sys.argv[1], sys.argv[1:], environment)
