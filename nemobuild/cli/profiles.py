"""``nemobuild profiles``: what ships in ``engine_configs/``."""

from __future__ import annotations

from nemobuild.cli import output
from nemobuild.cli.options import Json


def profiles(json: Json = False) -> None:
    """List the profiles that ship with nemobuild."""
    from nemobuild.config import load_profile, profile_names

    found = {name: load_profile(name) for name in profile_names()}
    rows = [(name, p.runtime, p.checkpoint.precision, p.description) for name, p in found.items()]
    value = [{"name": name, **p.model_dump()} for name, p in found.items()]
    output.result(value, output.table(rows, ("profile", "runtime", "precision", "what it is")), as_json=json)
