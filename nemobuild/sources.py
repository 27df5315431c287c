"""Bring the weights of a profile or of a Hub repository to a local folder.

A source is a Hub id (``nvidia/NAME``), a folder, or ``package:smollm2-llama`` / ``package:smollm2-nas``: the demo
model, which comes out of a Python package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemobuild.config import load_profile
from nemobuild.errors import NemobuildError, UsageError
from nemobuild.model.hf_config import load_json
from nemobuild.places import COMMIT, is_profile, place

if TYPE_CHECKING:
    from nemobuild.weights.slice import Slice

_PACKAGED = {"package:smollm2-llama": "llama", "package:smollm2-nas": "nas"}


def is_hub_source(source: str) -> bool:
    """Whether a profile's ``model.source`` is a repository on the Hub, which has revisions."""
    return source not in _PACKAGED and not Path(source).is_dir()


def recorded_source(snapshot: Path) -> tuple[str, str]:
    """Repository and commit that a fetched snapshot is of; empty where it does not say."""
    try:
        source = load_json(snapshot / "source.json")
    except NemobuildError:
        return "", ""
    return str(source.get("repo", "")), str(source.get("commit", ""))


def fetch_source(
    source: str, target: Path | None, revision: str | None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Folder with the complete weights of ``source``; a folder that is complete already is returned as it is.

    ``progress`` gets (done, total) bytes. Raises ``RemoteError``, ``IntegrityError`` or ``UsageError``.
    """
    name = source
    if is_profile(source):
        model = load_profile(source).model
        name, revision = model.source, revision or model.revision
        if not Path(name).is_dir():
            target = target or place(source, "snapshot")
    if name in _PACKAGED:
        from nemobuild.demo import write_smollm2

        return write_smollm2(_needed(target, source), form="llama" if _PACKAGED[name] == "llama" else "nas")
    if Path(name).is_dir():
        if target is not None or revision is not None:
            raise UsageError("local-source", f"{name} is a folder here: there is nothing to fetch.")
        return Path(name)
    from nemobuild.weights import hub

    return hub.fetch(name, revision or "main", _needed(target, source), progress=progress)


def plan_slice(source: str, revision: str | None, blocks: Sequence[int] | None) -> Slice:
    """The slice of these blocks of ``source`` (``None``: one of each kind), before any weight is read.

    ``source`` is a Hub id, a folder, or a profile with one of them. Raises as ``fetch_source`` does.
    """
    from nemobuild.weights import slice as slices

    name = source
    if is_profile(source):
        model = load_profile(source).model
        name, revision = model.source, revision or model.revision
    if name in _PACKAGED:
        raise UsageError(
            "packaged-source",
            f"{name} is small, and comes whole.",
            next=f"nemobuild fetch {source} -o FOLDER; then cut FOLDER.",
        )
    if Path(name).is_dir():
        if revision is not None:
            raise UsageError("local-source", f"{name} is a folder here: it has no revisions.")
        return slices.plan_slice(slices.folder_origin(Path(name)), blocks)
    return slices.plan_slice(slices.hub_origin(name, revision or "main"), blocks)


def known_source(name: str, revision: str | None) -> dict[str, str] | None:
    """What ``source.json`` of this source will say, but its files, where that is certain before it is fetched."""
    if name in _PACKAGED:
        from nemobuild.demo import REQUIREMENT, SHA256

        return {"package": REQUIREMENT, "sha256": SHA256, "form": _PACKAGED[name]}
    return {"repo": name, "commit": revision} if revision and COMMIT.fullmatch(revision) else None


def _needed(target: Path | None, source: str) -> Path:
    if target is None:
        raise UsageError(
            "no-target", "A folder for the snapshot is needed.", next=f"nemobuild fetch {source} -o FOLDER"
        )
    return target
