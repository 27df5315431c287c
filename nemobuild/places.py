"""Where things are by default: ``build/PROFILE/{snapshot,checkpoint,repository}`` below the working folder.

Every command takes explicit paths too; these defaults only make the common road short.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from nemobuild.config import ModelConfig, known_models, load_profile, profile_names
from nemobuild.errors import NemobuildError, UsageError, from_os_error, nearest
from nemobuild.model.hf_config import load_json, load_spec
from nemobuild.plan.planner import Plan, plan
from nemobuild.resources import data_folder

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")


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
    """Folder with the weights of ``source``: a folder, or a profile whose snapshot was fetched.

    Raises ``UsageError`` when there is none, and when the snapshot is of another source than the profile names now.
    """
    if Path(source).is_dir():
        return Path(source)
    if is_profile(source):
        model, folder = load_profile(source).model, place(source, "snapshot")
        if Path(model.source).is_dir():
            return Path(model.source)
        if not folder.is_dir():
            raise UsageError(
                "not-fetched", f"The weights of {source} are not here.", next=f"Type `nemobuild fetch {source}`."
            )
        _check_snapshot(source, model, folder)
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
    if model in known_models():
        return known / f"{model}.json"
    if is_profile(model):
        name = load_profile(model).model.known
        return known / f"{name}.json" if name else source_folder(model)
    names = known_models() + profile_names()
    raise UsageError("unknown-model", f"There is no model {model!r}.", why=nearest(model, names))


def load_plan(profile: str, gpu: str | None = None) -> Plan:
    """The plan of a profile: of its known model config, or of the snapshot that was fetched for it.

    ``gpu`` plans for another card than the profile's. Raises what ``load_profile``, ``config_file`` and ``plan`` raise.
    """
    config = load_profile(profile)
    return plan(load_spec(config_file(profile)), config, name=profile_name(profile), gpu=gpu)


def check_owner(profile: str) -> None:
    """Raise ``UsageError`` when ``build/NAME`` belongs to another profile of the same file name.

    One that is no longer where it was counts as moved, not as another.
    """
    note = _owner_note(profile)
    try:
        owner = note.read_text() if note.is_file() else ""
    except (OSError, ValueError):
        owner = ""
    if owner and owner != _identity(profile) and (owner in profile_names() or Path(owner).is_file()):
        load_profile(profile)  # what is no profile is told as that
        raise UsageError(
            "name-taken",
            f"{note.parent} belongs to the profile {owner}, not to {_identity(profile)}.",
            why="Profiles of one file name share that folder.",
            next=f"Rename one of the two files, or move {note.parent} away; then run the same command again.",
        )


def note_owner(profile: str) -> None:
    """Write down that ``build/NAME``, which exists, belongs to ``profile``; see ``check_owner``."""
    check_owner(profile)
    try:
        _owner_note(profile).write_text(_identity(profile))
    except OSError as error:
        raise from_os_error(error, _owner_note(profile), "writing") from error


def _owner_note(profile: str) -> Path:
    return place(profile, ".profile")


def _identity(profile: str) -> str:
    """A shipped profile by its name, another one by where it is."""
    return profile if profile in profile_names() else os.path.realpath(profile)


def _check_snapshot(profile: str, model: ModelConfig, folder: Path) -> None:
    """What was fetched for a profile stays when the profile changes, so it is asked what it is.

    A branch or a tag is not compared: it became a commit when it was fetched.
    """
    try:
        record = load_json(folder / "source.json")
    except NemobuildError:
        record = {}
    packaged = f"package:smollm2-{record.get('form')}" if "package" in record else None
    found, commit = str(packaged or record.get("repo", "something unknown")), str(record.get("commit", ""))
    pinned = model.revision if COMMIT.fullmatch(model.revision or "") else None
    if found == model.source and pinned in (None, commit):
        return
    wanted = f"{model.source} at {pinned}" if pinned else model.source
    raise UsageError(
        "another-source",
        f"{folder} holds {f'{found} at {commit}' if commit else found}; the profile names {wanted}.",
        why="It was fetched when model.source or model.revision was another.",
        next=f"Move {folder} away, then type `nemobuild fetch {profile}`.",
    )
