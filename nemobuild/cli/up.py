"""``nemobuild up``: from a profile to an endpoint, doing only what is not done yet."""

from __future__ import annotations

from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import ApiKeys, Events, Json, OpenAi, OpenAiHost, OpenAiPort, ReadyTimeout


def up(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and why.")] = False,
    device: Annotated[str, typer.Option(help="Where FP8 is calibrated: cpu or cuda.")] = "cpu",
    openai: OpenAi = False,
    openai_host: OpenAiHost = None,
    openai_port: OpenAiPort = None,
    api_keys: ApiKeys = None,
    timeout_s: ReadyTimeout = 600.0,
    events: Events = False,
    json: Json = False,
) -> None:
    """Fetch, convert, build and publish what is not there yet, then serve it until Ctrl-C."""
    from nemobuild.cli.build import run, show
    from nemobuild.cli.serve import run as serve
    from nemobuild.pipeline import Options, publish, steps

    options = Options(device=device)
    if dry_run:
        show(steps(profile, options), done=False, json=json)
        return
    done = run(profile, options, quiet=json, events=events)
    publication = publish(profile)
    if events:
        output.event("published", version=publication.number, keys=dict(publication.keys))
    elif not json:
        kept = "all is there" if all(step.action == "keep" for step in done) else "done"
        output.hint(f"{kept}; {publication.profile} version {publication.number}")
    serve(
        profile,
        openai=openai,
        openai_host=openai_host,
        openai_port=openai_port,
        api_keys=api_keys,
        timeout_s=timeout_s,
        json=json,
        events=events,
    )
