"""All files of one target, and how they come into a folder: each whole, all or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from nemobuild.deploy.compose import compose
from nemobuild.deploy.dynamo import graph
from nemobuild.deploy.image import dockerfile
from nemobuild.deploy.k8s import manifests
from nemobuild.deploy.served import Options
from nemobuild.errors import UsageError, from_os_error, nearest
from nemobuild.plan.planner import Plan

_TARGETS: dict[str, Callable[[Plan, Options], dict[str, str]]] = {"compose": compose, "k8s": manifests, "dynamo": graph}
_OWN_IMAGE = ("compose", "k8s")  # Dynamo has an image of its own


def deployment_files(plan: Plan, target: str, options: Options) -> dict[str, str]:
    """File name -> text. Raises ``UsageError`` for an unknown target, else what the target raises."""
    if target not in _TARGETS:
        raise UsageError("unknown-target", f"--to {target} is unknown.", why=nearest(target, _TARGETS))
    files = _TARGETS[target](plan, options)
    return files | ({"Dockerfile": dockerfile(plan, options)} if target in _OWN_IMAGE else {})


def write_deployment(files: dict[str, str], folder: Path) -> None:
    """Write ``files``. Other files in ``folder``, such as API keys, stay.

    Raises ``UsageError`` when the folder cannot be written.
    """
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for name in files:
            (new / name).replace(folder / name)
        new.rmdir()
    except OSError as error:
        raise from_os_error(error, folder, "writing") from error
