"""Where things are by default: ``build/PROFILE/{snapshot,checkpoint,repository}`` below the working folder.

Every command takes explicit paths too; these defaults only make the common road short.
"""

from __future__ import annotations

import re
from pathlib import Path

from nemobuild.config import EngineConfig, load_profile, profile_names
from nemobuild.errors import UsageError, nearest
from nemobuild.model.hf_config import load_spec
from nemobuild.plan.planner import Plan, plan
from nemobuild.resources import data_folder

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def place(profile: str, stage: str) -> Path:
    """Default folder of a stage: ``snapshot``, ``checkpoint`` or ``repository``."""
    return Path("build") / profile_name(profile) / stage


def profile_name(profile: str) -> str:
    """Name of a profile given by name or by path; a name may hold dots (``super-49b-v1.5-h100-fp8``)."""
    path = Path(profile)
    return path.stem if path.suffix in (".yaml", ".yml") else path.name


def is_profile(name: str) -> bool:
    return name in profile_names() or Path(name).suffix in (".yaml", ".yml")


def source_folder(source: str) -> Path:
    """Folder with the weights of ``source``: a folder, or a profile whose snapshot was fetched."""
    if Path(source).is_dir():
        return Path(source)
    if is_profile(source):
        profile = load_profile(source)
        folder = Path(profile.model.source) if Path(profile.model.source).is_dir() else place(source, "snapshot")
        if not folder.is_dir():
            raise UsageError(
                "not-fetched", f"The weights of {source} are not here.", next=f"Type `nemobuild fetch {source}`."
            )
        return folder
    if _HUB_ID.fullmatch(source):
        raise UsageError(
            "not-fetched",
            f"There is no folder {source}.",
            why="It looks like the name of a Hub repository.",
            next=f"Type `nemobuild fetch {source} -o FOLDER`, then name that folder.",
        )
    raise UsageError("no-source", f"There is no folder {source}.", why=nearest(source, profile_names()))


def config_file(model: str) -> Path:
    """``config.json`` of ``model``: a file, a folder, a known model, or a profile."""
    known = data_folder("engine_configs") / "models"
    path = Path(model)
    if path.is_dir() or (path.is_file() and not is_profile(model)):
        return path
    if (known / f"{model}.json").is_file():
        return known / f"{model}.json"
    if is_profile(model):
        profile: EngineConfig = load_profile(model)
        return known / f"{profile.model.known}.json" if profile.model.known else source_folder(model)
    names = [p.stem for p in known.glob("*.json")] + profile_names()
    raise UsageError("unknown-model", f"There is no model {model!r}.", why=nearest(model, names))


def load_plan(profile: str, gpu: str | None = None) -> Plan:
    """The plan of a profile: of its known model config, or of the snapshot that was fetched for it.

    ``gpu`` plans for another card than the profile's. Raises what ``load_profile``, ``config_file`` and ``plan`` raise.
    """
    config = load_profile(profile)
    return plan(load_spec(config_file(profile)), config, name=profile_name(profile), gpu=gpu)
