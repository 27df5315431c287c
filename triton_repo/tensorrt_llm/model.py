"""The ``tensorrt_llm`` model on the CPU runtime: the checkpoint run as it is."""

import json
from pathlib import Path

from .engine_model import EngineModel
from .lib.engine.cpu.scheduler import Engine


class TritonPythonModel(EngineModel):
    def load(self, config):
        limits = json.loads(config["parameters"]["cpu_engine"]["string_value"])
        return Engine(Path(__file__).resolve().parent / "checkpoint", **limits)
