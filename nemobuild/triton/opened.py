"""A model repository on disk, read for looking over: nothing of it is executed, and no file is read without a bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemobuild.errors import NemobuildError, UsageError
from nemobuild.model.hf_config import load_json
from nemobuild.triton.repository import MANIFEST

MAX_TEXT_BYTES = 4 << 20
CONFIG = "config.pbtxt"


@dataclass(frozen=True, slots=True)
class Opened:
    """``models`` are the messages of those whose ``config.pbtxt`` parses, ``broken`` says why others do not.

    ``manifest`` is empty where there is none, or none that can be read.
    """

    folder: Path
    models: Mapping[str, Any]
    broken: Mapping[str, str]
    manifest: Mapping[str, Any]

    @property
    def runtime(self) -> str:
        """``cpu``, ``tensorrt`` or ``llmapi`` as the manifest says; empty without one."""
        profile = self.manifest.get("profile")
        return str(profile.get("runtime", "")) if isinstance(profile, dict) else ""

    def text(self, name: str) -> str:
        """A text file of the repository; empty when there is none."""
        try:
            with (self.folder / name).open("rb") as stream:
                return stream.read(MAX_TEXT_BYTES).decode("utf-8", "replace")
        except OSError:
            return ""

    def names(self, pattern: str) -> list[str]:
        """Paths in the repository of the files that match."""
        found = (path for path in self.folder.glob(pattern) if path.is_file() or path.is_symlink())
        return sorted(path.relative_to(self.folder).as_posix() for path in found if "__pycache__" not in path.parts)


def open_repository(folder: Path) -> Opened:
    """Raises ``UsageError`` when ``folder`` is no model repository."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    if not any(folder.glob(f"*/{CONFIG}")):
        raise UsageError(
            "no-repository", f"{folder} is not a model repository.", next="Make one: `nemobuild repo PROFILE -o DIR`."
        )
    read = Opened(folder, {}, {}, {})
    models, broken = {}, {}
    for name in read.names(f"*/{CONFIG}"):
        model = Path(name).parent.name
        try:
            models[model] = text_format.Parse(read.text(name), pb.ModelConfig())
        except text_format.ParseError as error:
            broken[model] = str(error)
    try:
        manifest = load_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    except NemobuildError:
        manifest = {}
    return Opened(folder, models, broken, manifest)
