"""A stand-in for the vendor's ``tritonserver``: the real carried Triton, with a backend ``tensorrtllm`` in Python.

Under ``mpirun`` every rank but the first only waits, as the workers of the real backend do: it checks that it was told
to load the engine model alone, and opens no port.
"""

import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) > 0:
    if not {"--model-control-mode=explicit", "--load-model=tensorrt_llm"} <= set(sys.argv):
        raise SystemExit("error: this rank would load the text models a second time")
    print("rank waits", flush=True)
    signal.pause()

sys.path.append(str(HERE / "site-packages"))
from nemobuild.triton.carrier import carried_triton  # noqa: E402

triton = carried_triton()
backends = Path(os.environ["STANDIN_IMAGE"]) / "loaded"
if not backends.is_dir():
    backends.mkdir()
    (backends / "python").symlink_to(triton.backend_directory / "python")
    (backends / "tensorrtllm").symlink_to(HERE / "tensorrtllm")
arguments = [*sys.argv[1:], f"--backend-directory={backends}"]
os.execve(triton.binary, [str(triton.binary), *arguments], os.environ | dict(triton.env))
