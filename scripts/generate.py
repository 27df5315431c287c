"""Write the files that are made from the code: CLI reference, profile table, JSON Schema, error codes, config.pbtxt.

With ``--check`` nothing is written; the exit status is 1 when a file is stale.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

from nemobuild.config import EngineConfig, load_profile, profile_names
from nemobuild.runtime.fields import INPUTS, OUTPUTS
from nemobuild.triton.models import repository_models
from nemobuild.triton.pbtxt import render

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("profiles", "inspect", "fetch", "convert", "verify", "repo", "serve", "chat")
NOTE = "<!-- made by `make generate` -->\n\n"


def cli_reference() -> str:
    parts = ["# Commands\n\n" + NOTE]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    for command in ("", *COMMANDS):
        arguments = [command, "--help"] if command else ["--help"]
        done = subprocess.run(
            [sys.executable, "-m", "nemobuild", *arguments], capture_output=True, text=True, check=True, env=environment
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        parts.append(f"## `nemobuild{' ' + command if command else ''}`\n\n```text\n{text}\n```\n\n")
    return "".join(parts).rstrip() + "\n"


def profile_table() -> str:
    lines = [
        "# Profiles\n\n" + NOTE,
        "| profile | runtime | precision | ranks | context | what it is |\n|---|---|---|---|---|---|\n",
    ]
    for name in profile_names():
        p = load_profile(name)
        ranks = p.checkpoint.tensor_parallel * p.checkpoint.pipeline_parallel
        context = p.limits.max_context_tokens
        lines.append(f"| `{name}` | {p.runtime} | {p.checkpoint.precision} | {ranks} | {context} | {p.description} |\n")
    return "".join(lines)


def field_table() -> str:
    lines = ["# Requests and answers\n\n" + NOTE]
    for title, fields in (("What a client may send", INPUTS), ("What comes back", OUTPUTS)):
        lines.append(f"## {title}\n\n| tensor | type | meaning |\n|---|---|---|\n")
        for field in fields:
            kind = f"{field.type} [-1]" if field.is_list else field.type
            lines.append(f"| `{field.name}` | {kind} | {field.meaning} |\n")
        lines.append("\n")
    return "".join(lines).rstrip() + "\n"


def error_codes() -> str:
    """Every ``raise Kind("code", "what")`` in the package."""
    found: dict[str, tuple[str, str]] = {}
    for file in sorted((ROOT / "nemobuild").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) >= 2:
                code = node.args[0]
                if node.func.id in KINDS and isinstance(code, ast.Constant) and isinstance(code.value, str):
                    found.setdefault(code.value, (node.func.id, _sentence(node.args[1])))
    lines = ["# Error codes\n\n" + NOTE, "| code | exit status | says |\n|---|---|---|\n"]
    lines += [f"| `{code}` | {KINDS[kind]} | {text} |\n" for code, (kind, text) in sorted(found.items())]
    return "".join(lines)


def _sentence(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return "…"


KINDS = {
    "UsageError": 2,
    "DoesNotFit": 3,
    "ToolchainError": 4,
    "IntegrityError": 5,
    "RemoteError": 6,
    "VerificationFailed": 7,
    "ChildFailed": 8,
}


def generated() -> dict[Path, str]:
    files = {
        ROOT / "docs" / "commands.md": cli_reference(),
        ROOT / "docs" / "profiles.md": profile_table(),
        ROOT / "docs" / "requests.md": field_table(),
        ROOT / "docs" / "errors.md": error_codes(),
        ROOT / "engine_configs" / "schema.json": json.dumps(EngineConfig.model_json_schema(), indent=1) + "\n",
    }
    for name in profile_names():
        for model in repository_models(load_profile(name)):
            files[ROOT / "tests" / "golden" / name / f"{model.name}.pbtxt"] = render(model)
    return files


def main() -> None:
    check = "--check" in sys.argv
    stale = 0
    for path, text in generated().items():
        present = path.read_text(encoding="utf-8") if path.exists() else ""
        if present == text:
            continue
        stale += 1
        name = path.relative_to(ROOT)
        if check:
            print(f"{name} is stale; run `make generate`")
            sys.stdout.writelines(list(difflib.unified_diff(present.splitlines(True), text.splitlines(True), n=1))[:20])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
