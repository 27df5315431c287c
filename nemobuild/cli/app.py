"""All commands of ``nemobuild``: one file each, each a thin layer over one library call."""

from __future__ import annotations

from typing import Annotated

import typer

from nemobuild import __version__
from nemobuild.cli.bench import bench
from nemobuild.cli.build import build
from nemobuild.cli.chat import chat
from nemobuild.cli.ci import ci
from nemobuild.cli.convert import convert
from nemobuild.cli.deploy import deploy
from nemobuild.cli.doctor import doctor
from nemobuild.cli.fetch import fetch
from nemobuild.cli.inspect import inspect
from nemobuild.cli.key import key
from nemobuild.cli.migrate import migrate
from nemobuild.cli.plan import plan
from nemobuild.cli.profiles import profiles
from nemobuild.cli.rebuild import rebuild
from nemobuild.cli.repo import repo
from nemobuild.cli.roll import roll, rollback
from nemobuild.cli.serve import serve
from nemobuild.cli.store import store
from nemobuild.cli.up import up
from nemobuild.cli.verify import verify

app = typer.Typer(
    name="nemobuild",
    help="From Hugging Face weights of Nemotron models to an endpoint that serves them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nemobuild {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for command in (
    profiles,
    inspect,
    plan,
    up,
    fetch,
    convert,
    verify,
    build,
    rebuild,
    migrate,
    serve,
    roll,
    rollback,
    key,
    chat,
    bench,
    doctor,
    deploy,
):
    app.command()(command)
app.add_typer(repo, name="repo")
app.add_typer(store, name="store")
app.add_typer(ci, name="ci")
