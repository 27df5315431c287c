"""``nemobuild deploy``: files for Compose, Kubernetes or NVIDIA Dynamo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json


def deploy(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file.")],
    to: Annotated[str, typer.Option(help="compose, k8s or dynamo.")],
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to; default: build/PROFILE/deploy/TARGET.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="The image to run, where you pushed it.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model at least (k8s, dynamo).")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="Copies at most, for the autoscaler (k8s).")] = 4,
    gpus_per_node: Annotated[
        int, typer.Option(min=1, help="Cards of one node; more ranks than that go over several nodes (k8s).")
    ] = 8,
    json: Json = False,
) -> None:
    """Write the files that serve a profile's repository elsewhere, with every number from its plan. Starts nothing."""
    from nemobuild.deploy.served import Options
    from nemobuild.deploy.write import deployment_files, write_deployment
    from nemobuild.places import load_plan, place

    options = Options(image=image, replicas=replicas, max_replicas=max_replicas, gpus_per_node=gpus_per_node)
    files = deployment_files(load_plan(profile), to, options)
    target = folder or place(profile, "deploy") / to
    write_deployment(files, target)
    paths = [str(target / name) for name in files]
    output.result({"target": to, "files": paths}, "\n".join(paths), as_json=json)
