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

import yaml
from pages import pages

from nemobuild.cli.plan import as_text
from nemobuild.config import EngineConfig, profile_names
from nemobuild.deploy.served import Options
from nemobuild.deploy.write import deployment_files
from nemobuild.engine.llmapi import model_yaml
from nemobuild.places import load_plan
from nemobuild.plan.gpus import gpus
from nemobuild.plan.picture import svg_picture
from nemobuild.plan.report import as_json
from nemobuild.plan.toolchain import toolchains
from nemobuild.runtime.fields import INPUTS, OUTPUTS
from nemobuild.triton.models import repository_models
from nemobuild.triton.pbtxt import render
from nemobuild.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    *("profiles", "inspect", "plan", "fetch", "convert", "verify", "build"),
    *("repo", "repo emit", "repo check", "serve", "key", "chat", "bench", "doctor", "deploy", "ci init"),
    *("up", "rebuild", "roll", "rollback", "migrate", "store"),
    *(f"store {name}" for name in ("ls", "show", "verify", "gc", "discard", "export", "import", "push", "pull")),
    *("store sign",),
)
# One of each runtime: the others differ in their limits only.
GOLDEN_REPOSITORIES = ("smollm2-nas-cpu", "super-49b-v1.5-h100-fp8", "super-49b-v1.5-h100-fp8-llmapi")
# Profile and card: one that fits, one that does not.
PLANS = (("super-49b-v1.5-h100-fp8", None), ("super-49b-v1.5-h200-bf16", "h100-sxm"))
NOTE = "<!-- made by `make generate` -->\n\n"


def cli_reference() -> str:
    parts = ["# Commands\n\n" + NOTE]
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    for command in ("", *COMMANDS):
        arguments = [*command.split(), "--help"]
        done = subprocess.run(
            [sys.executable, "-m", "nemobuild", *arguments], capture_output=True, text=True, check=True, env=environment
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        parts.append(f"## `nemobuild{' ' + command if command else ''}`\n\n```text\n{text}\n```\n\n")
    return "".join(parts).rstrip() + "\n"


def profile_table() -> str:
    lines = [
        "# Profiles\n\n" + NOTE,
        "| profile | runtime | machine | precision | context | requests | KV cache | what it is |\n",
        "|---|---|---|---|---|---|---|---|\n",
    ]
    for name in profile_names():
        made = load_plan(name)
        p = made.profile
        machine = "this machine" if p.machine is None else f"{p.machine.count} x {p.machine.gpu}"
        lines.append(
            f"| `{name}` | {p.runtime} | {machine} | {p.checkpoint.precision} | {p.limits.max_context_tokens:,} | "
            f"{made.max_batch_size} | {made.kv_cache_tokens:,} tokens | {p.description} |\n"
        )
    return "".join(lines)


def planning() -> str:
    """Cards, containers, and two plans as they are shown."""
    lines = ["# Planning\n\n" + NOTE, "## Cards\n\n"]
    lines.append(
        "| name | card | memory | compute | bandwidth | BF16 / FP8 dense | note |\n|---|---|---|---|---|---|---|\n"
    )
    for gpu in gpus():
        fp8 = "no FP8" if gpu.fp8_flops is None else f"{gpu.fp8_flops / 1e12:,.0f} TFLOP/s"
        lines.append(
            f"| `{gpu.name}` | {gpu.title} | {format_bytes(gpu.memory_bytes)} | {gpu.sm[0]}.{gpu.sm[1]} | "
            f"{gpu.bandwidth_bytes_per_s / 1e12:.2f} TB/s | {gpu.bf16_flops / 1e12:,.0f} / {fp8} | "
            f"{' '.join(gpu.notes)} |\n"
        )
    lines.append(
        "\n## Containers\n\n| tag | TensorRT-LLM | TensorRT | CUDA | driver | runtimes |\n|---|---|---|---|---|---|\n"
    )
    for tag, chain in toolchains().items():
        fields = (
            tag,
            chain.trtllm,
            chain.tensorrt,
            chain.cuda,
            chain.driver or "not listed",
            ", ".join(chain.runtimes),
        )
        lines.append(f"| {' | '.join(fields)} |\n")
    lines.append("\n## A plan that fits\n\n![memory and ceilings](plan.svg)\n\n")
    for title, (name, gpu_name) in (("", PLANS[0]), ("## A plan that does not\n\n", PLANS[1])):
        option = f" --gpu {gpu_name}" if gpu_name else ""
        lines.append(f"{title}```text\n$ nemobuild plan {name}{option}\n{as_text(load_plan(name, gpu_name))}\n```\n\n")
    return "".join(lines).rstrip() + "\n"


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
        ROOT / "docs" / "planning.md": planning(),
        ROOT / "docs" / "plan.svg": svg_picture(load_plan(PLANS[0][0])),
        ROOT / "docs" / "requests.md": field_table(),
        ROOT / "docs" / "errors.md": error_codes(),
        ROOT / "engine_configs" / "schema.json": json.dumps(EngineConfig.model_json_schema(), indent=1) + "\n",
    }
    for name in filter(lambda name: name.startswith("super-49b-v1.5"), profile_names()):
        made = load_plan(name)
        golden = ROOT / "tests" / "golden" / "plan"
        files[golden / f"{name}.txt"] = as_text(made, explain=True) + "\n"
        files[golden / f"{name}.json"] = json.dumps(as_json(made), indent=1) + "\n"
    for name in GOLDEN_REPOSITORIES:
        plan = load_plan(name)
        golden = ROOT / "tests" / "golden" / name
        files |= {golden / f"{model.name}.pbtxt": render(model) for model in repository_models(plan)}
        if plan.profile.runtime == "llmapi":
            files[golden / "model.yaml"] = yaml.safe_dump(model_yaml(plan, "checkpoint"), sort_keys=False)
    files |= pages()
    for name in profile_names():
        plan = load_plan(name)
        golden = ROOT / "tests" / "golden" / "deploy"
        for target in ("compose", "k8s", "dynamo"):
            if target == "dynamo" and plan.profile.runtime != "llmapi":
                continue
            for file, text in deployment_files(plan, target, Options()).items():
                base = plan.toolchain.tag if plan.toolchain else "cpu"
                files[golden / (f"Dockerfile.{base}" if file == "Dockerfile" else f"{name}/{file}")] = text
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
