"""The documentation: the site builds without a warning, every runnable block runs, metrics and alerts are real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
import yaml

from nemobuild.deploy.k8s import QUEUE_METRIC
from nemobuild.gateway.observe import Facts, Metrics

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import run_docs  # noqa: E402

OPERATIONS = ROOT / "docs" / "operations"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "tutorial.html").read_text()
    assert not re.findall(r'(?:src|href)="(https?:)?//[^"]*\.(?:js|css|woff2?)"', page), "nothing from other hosts"


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("page", run_docs.runnable_pages(), ids=lambda page: page.stem)
def test_every_runnable_block_runs(page: Path, tmp_path: Path) -> None:
    assert not run_docs.run_page(page, tmp_path)


def test_the_runner_finds_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\necho one; echo two\n```\n\n```text\ntwo\none\n```\n")
    (wrong,) = run_docs.run_page(page, tmp_path / "order")
    assert "line 1 did not print 'one'" in wrong
    page.write_text("```sh\ntrue\n```\n```sh\nfalse | true\n```\n```python\nprint(1)\n```\n")
    (wrong,) = run_docs.run_page(page, tmp_path / "status")
    assert "line 7 was not reached" in wrong
    page.write_text("```sh\nsleep 600 &\n```\n```python\nraise SystemExit(3)\n```\n")
    (wrong,) = run_docs.run_page(page, tmp_path / "last")
    assert "status 3" in wrong
    page.write_text("```console\n$ false\n```\n```python\nprint('here')\n```\n\n```text\nhere\n```\n")
    assert not run_docs.run_page(page, tmp_path / "good")


def known_metrics() -> set[str]:
    """Names of all series that the gateway offers, labels seen."""
    metrics = Metrics()
    metrics.tell(Facts(error="x", first_token_s=0.1), "/v1/completions", 200)
    return set(re.findall(r"^(\w+)(?:\{.*\})? ", metrics.text().decode(), re.MULTILINE))


def series(expression: object) -> set[str]:
    """Every metric that a PromQL expression reads."""
    return set(re.findall(r"\b(?:nemobuild_\w+|up)\b", str(promql_parser.parse(str(expression)))))


def test_alerts_and_dashboard_read_metrics_that_exist() -> None:
    known = known_metrics() | {"up"}
    rules = yaml.safe_load((OPERATIONS / "alerts.yaml").read_text())["groups"][0]["rules"]
    for rule in rules:
        assert series(rule["expr"]) and series(rule["expr"]) <= known, rule["alert"]
        assert rule["alert"] in (OPERATIONS / "watch.md").read_text(), "every alert says what to do"
    dashboard = json.loads((OPERATIONS / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m")
            assert series(expression) and series(expression) <= known, panel["title"]
    assert QUEUE_METRIC in known
    named = set(re.findall(r"`(nemobuild_gateway_\w+)`", (OPERATIONS / "watch.md").read_text()))
    assert {name for name in named if name not in known and f"{name}_bucket" not in known} == set()


def test_every_command_named_in_the_pages_exists() -> None:
    """``nemobuild WORD`` in a page is a command, and its long options are that command's."""
    import typer.main

    from nemobuild.cli.app import app

    group = typer.main.get_command(app)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if page.name in ("commands.md", "errors.md"):
            continue
        text = page.read_text()
        lines = re.findall(r"(?:^\$ |`)nemobuild ([a-z][^`\n|&]*)", text, re.MULTILINE)
        for block in run_docs.blocks(text):
            lines += re.findall(r"^nemobuild ([^\n|&]*)", block.text, re.MULTILINE)
        for words in lines:
            command, parts = group, words.split()
            while parts and hasattr(command, "commands") and parts[0] in command.commands:
                command = command.commands[parts.pop(0)]
            assert command is not group, f"{page.name}: nemobuild {words}"
            known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
            used = {word.split("=")[0] for word in parts if word.startswith("--")}
            assert used <= known | {"--help"}, f"{page.name}: nemobuild {words}"
