"""Pages of the documentation whose every number comes from a plan or from data: the 49B on an H100, advisories."""

from __future__ import annotations

import shlex
from pathlib import Path

import jinja2

from nemobuild import pipeline
from nemobuild.deploy.served import Options, served
from nemobuild.places import load_plan
from nemobuild.plan.advisories import advisories, open_advisories, read_on
from nemobuild.plan.planner import Plan
from nemobuild.plan.report import as_json, decode, prefill, verdict
from nemobuild.plan.toolchain import toolchains
from nemobuild.units import format_bytes, format_seconds

PROFILE = "super-49b-v1.5-h100-fp8"
LLMAPI = "super-49b-v1.5-h100-fp8-llmapi"
TOO_LARGE = ("super-49b-v1.5-h200-bf16", "h100-sxm")
TEMPLATE = Path(__file__).with_name("h100.md.j2")
ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
ENVIRONMENT.filters |= {"bytes": format_bytes, "count": lambda number: f"{number:,.0f}"}
NOTE = "<!-- made by `make generate` -->\n\n"


def h100_page() -> str:
    plan, large = load_plan(PROFILE), load_plan(*TOO_LARGE)
    ceilings, (longest, reading) = decode(plan), prefill(plan)[-1]
    lines = dict(pipeline.commands(plan))
    missing = large.shortfalls[0].rstrip(".")
    template = ENVIRONMENT.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        plan=plan,
        llmapi=load_plan(LLMAPI),
        chain=plan.toolchain,
        verdict=verdict(plan),
        needs={need.stage: need for need in plan.host},
        most=max(plan.host, key=lambda need: need.memory_bytes),
        disk=sum(need.disk_bytes for need in plan.host),
        first=ceilings[0],
        last=ceilings[-1],
        longest=longest,
        reading=reading,
        missing=missing[0].lower() + missing[1:],
        ledger=_ledger(plan),
        build_line=shlex.join(lines["or where trtllm-build is installed"]).replace(f"{Path.cwd()}/", ""),
        ready=format_seconds(served(plan, Options()).ready_timeout_s),
    )


def _ledger(plan: Plan) -> str:
    lines = ["    | memory | size | is | how |", "    |---|---|---|---|"]
    for line in as_json(plan)["ranks"][0]["lines"]:
        formula = str(line["formula"]).replace("|", "\\|")
        lines.append(f"    | {line['name']} | {format_bytes(line['bytes'])} | {line['label']} | {formula} |")
    return "\n".join(lines)


def advisories_page() -> str:
    lines = [
        f"# Advisories\n\n{NOTE}",
        "NVIDIA's security bulletins about Triton and TensorRT-LLM, as far as they concern the containers that\n",
        f"nemobuild knows. A static list, read on {read_on()} from NVIDIA's product-security repository: later\n",
        "bulletins, and holes in the base system of an image, are not in it. `nemobuild doctor` and\n",
        "`nemobuild build` show what is open for a profile.\n\n",
        "| bulletin | date | product | fixed in | worst (CVSS) | CVEs | what |\n|---|---|---|---|---|---|---|\n",
    ]
    for a in reversed(advisories()):
        link = f"[{a.id}]({a.source})"
        lines.append(f"| {link} | {a.date} | {a.product} | {a.fixed_in} | {a.worst} | {len(a.cves)} | {a.what} |\n")
    lines.append("\n## Open, by container\n\n| container | TensorRT-LLM | open bulletins |\n|---|---|---|\n")
    for tag, chain in toolchains().items():
        lines.append(f"| {tag} | {chain.trtllm} | {', '.join(str(a.id) for a in open_advisories(chain))} |\n")
    carried = ", ".join(str(a.id) for a in open_advisories(None))
    lines.append(f"| cpu runtime (Triton 2.51.0) | none | {carried} |\n\n")
    lines.append(
        "What nemobuild does about them: Triton listens on loopback and stands behind the gateway; its routes for\n"
        "loading models, shared memory, tracing and logging are closed; templates and requests are bounded; weights\n"
        "are read from safetensors only, never unpickled; the containers of `deploy` run without root, capabilities\n"
        "and network. The cpu runtime is for trials and CI.\n"
    )
    return "".join(lines)


def pages() -> dict[Path, str]:
    docs = Path(__file__).resolve().parent.parent / "docs"
    return {docs / "h100.md": h100_page(), docs / "advisories.md": advisories_page()}
