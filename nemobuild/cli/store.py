"""``nemobuild store``: what was made and published, what uses it, and the ways in and out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json
from nemobuild.errors import UsageError

store = typer.Typer(no_args_is_help=True, help="Everything that was made, by what it was made from.")

What = Annotated[str, typer.Argument(help="Profile with a publication, or the first digits of a key.")]
Profile = Annotated[str, typer.Argument(help="Profile with a publication.")]
Address = Annotated[str, typer.Argument(help="Folder, s3://BUCKET/..., another of fsspec, or hf://OWNER/NAME.")]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_PREFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@store.command("ls")
def ls(json: Json = False) -> None:
    """What is stored: size, age, and what uses it; then the publications."""
    from dataclasses import asdict

    from nemobuild.store import Store
    from nemobuild.store.listing import entries
    from nemobuild.units import format_bytes, format_seconds

    opened = Store()
    found = entries(opened)
    rows = [
        (e.stage, e.key[:12], format_bytes(e.size_bytes), format_seconds(e.age_s), ", ".join(e.users) or "nothing")
        for e in found
    ]
    current = {name: opened.current(name) for name in opened.profiles()}
    versions = [
        (f"{one.profile} {one.number}", one.made_at, one.gates, "current" if one == current[name] else "", one.note)
        for name in current
        for one in opened.publications(name)
    ]
    text = output.table(rows, ("stage", "key", "size", "unused for", "used by")) if rows else "nothing is stored"
    if versions:
        text += "\n\n" + output.table(versions, ("publication", "made", "gates", "", "note"))
    value = {
        "root": str(opened.root),
        "objects": [asdict(entry) for entry in found],
        "publications": {name: [asdict(one) for one in opened.publications(name)] for name in current},
        "current": {name: one and one.number for name, one in current.items()},
    }
    output.result(value, text, as_json=json)


@store.command()
def show(what: What, json: Json = False) -> None:
    """Where an artefact comes from: repository and commit, calibration, tools, GPU, profile."""
    from nemobuild.store import Store
    from nemobuild.store.listing import find
    from nemobuild.units import format_bytes

    opened = Store()
    records = [dict(opened.record(*found)) for found in find(opened, what)]
    lines = []
    for record in records:
        files = record["files"].values()
        size = format_bytes(sum(file["bytes"] for file in files))
        lines += [f"{record['stage']}  {record['key']}", f"  made {record['made_at']}, {len(files)} files, {size}"]
        lines += [f"  {name}: {value}" for name, value in _flat(record["about"])]
    output.result(records, "\n".join(lines), as_json=json)


@store.command()
def verify(
    what: What,
    key: Annotated[Path | None, typer.Option(help="Public key in PEM: the signatures must hold as well.")] = None,
    json: Json = False,
) -> None:
    """Read all bytes and compare them with the digests that were taken when they were made."""
    from nemobuild.store import Store, signing
    from nemobuild.store.listing import find

    opened = Store()
    found = find(opened, what)
    for stage, name in found:
        opened.verify(stage, name)
        if key is not None:
            signing.verify(opened, stage, name, key)
    _show_objects(found, "whole" if key is None else "whole, and the signature holds", json)


@store.command()
def sign(
    what: What, key: Annotated[Path, typer.Option(help="Private elliptic-curve key in PEM.")], json: Json = False
) -> None:
    """Sign artefacts in the form of OpenSSF Model Signing, with your own key, offline."""
    from nemobuild.store import Store, signing
    from nemobuild.store.listing import find

    opened = Store()
    found = find(opened, what)
    for stage, name in found:
        signing.sign(opened, stage, name, key)
    _show_objects(found, "signed", json)


@store.command()
def gc(
    older_than: Annotated[
        str | None, typer.Option(help="Only what nothing has used for so long: 12h, 30d, 8w.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="The oldest, until no more than this is stored: 500G, 2T.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Forget publications before the newest KEEP of each profile first.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    json: Json = False,
) -> None:
    """Remove what no publication names and no place holds; without options all of that."""
    from nemobuild.store import Store
    from nemobuild.store.listing import collect
    from nemobuild.units import format_bytes

    opened = Store()
    age_s = None if older_than is None else _quantity(older_than, _UNITS, "30d")
    bound = None if max_size is None else _quantity(max_size, _PREFIXES, "500G")
    removed = collect(opened, older_than_s=age_s, max_bytes=bound, keep=keep, dry_run=dry_run)
    rows = [(entry.stage, entry.key[:12], format_bytes(entry.size_bytes)) for entry in removed]
    value = [{"stage": entry.stage, "key": entry.key, "size_bytes": entry.size_bytes} for entry in removed]
    total = format_bytes(sum(entry.size_bytes for entry in removed))
    rows.append(("would be removed" if dry_run else "removed", str(len(removed)), total))
    output.result(value, output.table(rows), as_json=json)


@store.command()
def discard(what: What, json: Json = False) -> None:
    """Remove an artefact that was tampered with, whatever uses it. `build` makes it again."""
    from nemobuild.store import Store
    from nemobuild.store.listing import find

    opened = Store()
    if what in opened.profiles():
        raise UsageError("bad-key", f"{what} is a profile.", next="Give the first digits of one key.")
    found = find(opened, what)
    for stage, name in found:
        opened.discard(stage, name)
    _show_objects(found, "removed", json)


@store.command()
def push(profile: Profile, address: Address, json: Json = False) -> None:
    """Put the current publication and its artefacts somewhere else."""
    from nemobuild.store import Store, transfer

    with output.byte_progress("push", quiet=json) as show_progress:
        _show_publication(transfer.push(Store(), profile, address, show_progress), f"pushed to {address}", json)


@store.command()
def pull(profile: Profile, address: Address, json: Json = False) -> None:
    """Get what is current there, verified, and make it current here."""
    from nemobuild.store import Store, transfer

    with output.byte_progress("pull", quiet=json) as show_progress:
        _show_publication(transfer.pull(Store(), profile, address, show_progress), f"pulled from {address}", json)


@store.command()
def export(
    profile: Profile,
    file: Annotated[Path, typer.Argument(help="Archive to write; it must not exist.")],
    json: Json = False,
) -> None:
    """The current publication as one archive, for a site without a network."""
    from nemobuild.store import Store, transfer

    with output.byte_progress("export", quiet=json) as show_progress:
        _show_publication(transfer.export(Store(), profile, file, show_progress), f"exported to {file}", json)


@store.command("import")
def import_(file: Annotated[Path, typer.Argument(help="Archive that `export` wrote.")], json: Json = False) -> None:
    """Take an archive, verified, and make its publication current here."""
    from nemobuild.store import Store, transfer

    with output.byte_progress("import", quiet=json) as show_progress:
        for publication in transfer.import_(Store(), file, show_progress):
            _show_publication(publication, f"imported from {file}", json)


def _show_objects(found: list[tuple[str, str]], state: str, json: bool) -> None:
    value = [{"stage": stage, "key": key, "state": state} for stage, key in found]
    output.result(value, output.table([(stage, key[:12], state) for stage, key in found]), as_json=json)


def _show_publication(publication: Any, what: str, json: bool) -> None:
    from dataclasses import asdict

    output.result(asdict(publication), f"{publication.profile} version {publication.number}  {what}", as_json=json)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, inner in value.items():
        found += _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else [(f"{prefix}{name}", str(inner))]
    return found


def _quantity(text: str, units: dict[str, int], example: str) -> int:
    match = re.fullmatch(rf"(\d+)([{''.join(units)}])", text)
    if match is None:
        raise UsageError("bad-quantity", f"{text!r} is not a quantity such as {example}.", next="Correct it.")
    return int(match[1]) * units[match[2]]
