"""Workflows: those that ``ci init`` writes, and our own, through the linters of their ecosystems."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from nemobuild.ci import ACTIONS, workflow
from nemobuild.cli.app import app
from nemobuild.errors import UsageError

ROOT = Path(__file__).parent.parent
SOURCE = "git+https://example.org/nemobuild.git"
PROFILES = ("super-49b-v1.5-h100-fp8", "super-49b-v1.5-h100-fp8-llmapi", "smollm2-nas-cpu")
SCHEMAS = {"nemobuild.yml": "vendor.github-workflows", ".gitlab-ci.yml": "vendor.gitlab-ci"}


def check_schema(file: Path, schema: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def audit(file: Path) -> subprocess.CompletedProcess[str]:
    """Without the network; a pedantic look, in which a self-hosted runner is worth a word but no fault."""
    config = file.with_name("zizmor.yml")
    config.write_text("rules: {self-hosted-runner: {disable: true}}")
    command = [str(Path(sys.executable).with_name("zizmor")), "--offline", "--pedantic", "--config", str(config)]
    return subprocess.run([*command, "--no-progress", str(file)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("gitlab", [False, True])
@pytest.mark.parametrize("profile", PROFILES)
def test_templates_pass_the_linters(profile: str, gitlab: bool, tmp_path: Path) -> None:
    path, text = workflow(profile, SOURCE, gitlab=gitlab)
    assert not re.findall(r"@[A-Z_]+@", text), "every blank is filled"
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    done = check_schema(file, SCHEMAS[path.name])
    assert done.returncode == 0, done.stdout
    if not gitlab:
        done = audit(file)
        assert done.returncode == 0, done.stdout


def test_our_own_workflows_pass_the_linters(tmp_path: Path) -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert files
    for own in files:
        done = check_schema(own, "vendor.github-workflows")
        assert done.returncode == 0, done.stdout
        copy = tmp_path / ".github" / "workflows" / own.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(own.read_text())
        done = audit(copy)
        assert done.returncode == 0, done.stdout
        assert set(actions(own.read_text())) <= set(ACTIONS.values()), "one pin for all"


def actions(text: str) -> list[str]:
    return [line.split("uses: ")[1] for line in text.splitlines() if "uses: " in line]


def test_our_own_workflow_does_what_ci_run_does() -> None:
    steps = [
        step["run"]
        for job in yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    wanted = [line.split() for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert wanted
    for line in wanted:
        assert any(f"make {line[1]}" in step for step in steps), line


def test_the_linters_find_faults(tmp_path: Path) -> None:
    file = tmp_path / ".github" / "workflows" / "nemobuild.yml"
    file.parent.mkdir(parents=True)
    _, text = workflow(PROFILES[0], SOURCE)
    file.write_text(text.replace("runs-on:", "run-on:"))
    assert check_schema(file, "vendor.github-workflows").returncode
    file.write_text(text.replace('nemobuild plan "$PROFILE" |', "nemobuild plan ${{ github.head_ref }} |"))
    assert audit(file).returncode
    lab = tmp_path / ".gitlab-ci.yml"
    lab.write_text(workflow(PROFILES[0], SOURCE, gitlab=True)[1].replace("expose_as", "exposed_as"))
    assert check_schema(lab, "vendor.gitlab-ci").returncode


@pytest.mark.parametrize("gitlab", [False, True])
def test_every_nemobuild_line_is_one_that_the_command_takes(gitlab: bool) -> None:
    """The jobs of a template are read by the command's own parser, with names for their variables."""
    _, text = workflow(PROFILES[0], SOURCE, gitlab=gitlab)
    group = typing.cast("typing.Any", typer.main.get_command(app))
    names = {"$PROFILE": PROFILES[0], "$CPU_PROFILE": PROFILES[2], "$SLICE": "slice"}
    found = set()
    for line in text.splitlines():
        for part in line.split("nemobuild ")[1:] if line.strip().startswith(("-", "run:", "nemobuild", "echo")) else []:
            words = [names.get(word.strip('"'), word) for word in re.split("[|;>]", part)[0].split()]
            if words and words[0] in group.commands:
                group.commands[words[0]].make_context(words[0], words[1:])
                found.add(words[0])
    assert found >= {"plan", "fetch", "convert", "verify", "rebuild", "doctor"}


@pytest.mark.parametrize("gitlab", [False, True])
def test_a_slice_is_converted_where_the_model_is_on_the_hub_and_small_enough(gitlab: bool) -> None:
    for profile, has in (*((p, True) for p in PROFILES[:2]), (PROFILES[2], False), ("ultra-253b-v1-8xh100-fp8", False)):
        text = workflow(profile, SOURCE, gitlab=gitlab)[1]
        assert ("--blocks auto" in text) is has, profile
        assert "slice:" not in text and ":slice" not in text
        job = yaml.safe_load(text)["cpu"] if gitlab else yaml.safe_load(text)["jobs"]["cpu"]
        lines = job["script"] if gitlab else [step.get("run", "") for step in job["steps"]]
        assert any("verify" in line and "--weights-only" in line for line in lines) is has
        assert any("rebuild" in line for line in lines)


def test_the_gpu_never_runs_what_a_pull_request_brings() -> None:
    github = yaml.safe_load(workflow(PROFILES[0], SOURCE)[1])
    assert github["permissions"] == {}
    assert "pull_request" not in github["jobs"]["gpu"]["if"] and "push" not in github["jobs"]["gpu"]["if"]
    assert github["jobs"]["gpu"]["runs-on"] == ["self-hosted", "gpu"]
    assert "secrets" not in json.dumps(github["jobs"]["cpu"])
    gitlab = yaml.safe_load(workflow(PROFILES[0], SOURCE, gitlab=True)[1])
    assert "merge_request" not in json.dumps(gitlab["gpu"]["rules"])


def test_init_writes_once(tmp_path: Path) -> None:
    line = ["ci", "init", PROFILES[0], "--nemobuild", SOURCE, "-o", str(tmp_path)]
    assert CliRunner().invoke(app, line).exit_code == 0
    file = tmp_path / ".github" / "workflows" / "nemobuild.yml"
    assert PROFILES[0] in file.read_text()
    file.write_text("mine")
    done = CliRunner().invoke(app, line)
    assert isinstance(done.exception, UsageError) and file.read_text() == "mine"
    assert CliRunner().invoke(app, [*line, "--force"]).exit_code == 0
    assert file.read_text() != "mine"


def test_what_cannot_stand_in_a_workflow_is_refused() -> None:
    with pytest.raises(UsageError, match="not of the runtime cpu"):
        workflow(PROFILES[0], SOURCE, cpu_profile=PROFILES[0])
    with pytest.raises(UsageError, match="workflow"):
        workflow(PROFILES[0], SOURCE, runner='gpu"]\n')
    with pytest.raises(UsageError):
        workflow("no-such-profile", SOURCE)
