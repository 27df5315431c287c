"""The ``cpu`` runtime: a TensorRT-LLM checkpoint folder, run as it is by NumPy, with in-flight batching.

It stands in for the compiled engine on machines without a GPU. Carried byte for byte into the emitted repository, so
it imports the standard library, NumPy and its fellow travellers only.
"""

from ..request import Chunk, FinishReason, Generation, QueueFull, RequestError
from .scheduler import Engine, Stats

__all__ = ["Chunk", "Engine", "FinishReason", "Generation", "QueueFull", "RequestError", "Stats"]
