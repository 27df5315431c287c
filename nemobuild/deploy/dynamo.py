"""A graph for NVIDIA Dynamo, for those who outgrow one server: its frontend and router before workers of ``llmapi``.

Dynamo brings its own Triton-free server, so of our work it takes the checkpoint and the plan's limits; templates, tags
and tool calls are read by Dynamo's parsers, and requests follow its API, not the gateway's. Not run on a cluster by us.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemobuild.config import read_yaml
from nemobuild.deploy import objects
from nemobuild.deploy.served import Options, Served, on_one_node
from nemobuild.deploy.text import document
from nemobuild.engine.container import SHM_BYTES
from nemobuild.engine.llmapi import model_yaml
from nemobuild.errors import UsageError
from nemobuild.plan.planner import Plan
from nemobuild.resources import data_folder

_CHECKPOINT = "/checkpoint"
_ARGUMENTS = "/etc/nemobuild/engine.yaml"
_HEAD = """\
{name} for NVIDIA Dynamo, made by nemobuild from its plan. Dynamo's operator must be installed in the cluster.
The claim {label}-checkpoint must hold the content of build/PROFILE/checkpoint.
    kubectl apply --filename dynamo.yaml"""
# What our model inside Triton needs and Dynamo does otherwise: it reads text, and names the model itself.
_OURS = ("model", "skip_tokenizer_init", "triton_config")


def graph(plan: Plan, options: Options) -> dict[str, str]:
    """``{"dynamo.yaml": text}``. Raises as ``on_one_node`` does, and ``UsageError`` for another runtime than llmapi."""
    if plan.profile.runtime != "llmapi":
        raise UsageError(
            "dynamo-needs-llmapi",
            f"{plan.name} is of the runtime {plan.profile.runtime}; Dynamo runs llmapi only.",
            why="It takes the Hugging Face form of the checkpoint, not engines.",
            next=f"Type `nemobuild migrate {plan.name} --to llmapi`, then deploy that profile.",
        )
    what = on_one_node(plan, options)
    data = read_yaml(data_folder("engine_configs") / "dynamo.yaml")
    claim = objects.claim(what)
    claim["metadata"]["name"] = f"{what.name}-checkpoint"
    parts = [claim, _arguments(plan, what, data), _deployment(plan, what, options, data)]
    return {"dynamo.yaml": document(_HEAD.format(name=plan.name, label=what.name), *parts)}


def _arguments(plan: Plan, what: Served, data: dict[str, Any]) -> objects.Manifest:
    """The arguments of ``LLM``, in the version that Dynamo's image holds."""
    assert plan.toolchain is not None
    newer = replace(plan, toolchain=replace(plan.toolchain, trtllm=data["trtllm"]))
    arguments = {name: value for name, value in model_yaml(newer, _CHECKPOINT).items() if name not in _OURS}
    config = objects.named("v1", "ConfigMap", what, {}, f"{what.name}-engine")
    del config["spec"]
    return config | {"data": {"engine.yaml": document("", arguments)}}


def _deployment(plan: Plan, what: Served, options: Options, data: dict[str, Any]) -> objects.Manifest:
    frontend = {"spec": {"containers": [{"name": "main", "image": options.image or data["image"]}]}}
    components = [
        {"name": "Frontend", "type": "frontend", "replicas": 1, "podTemplate": frontend},
        {
            "name": "Worker",
            "type": "worker",
            "replicas": options.replicas,
            "sharedMemorySize": objects.quantity(SHM_BYTES),
            "podTemplate": {"spec": _worker(plan, what, options, data)},
        },
    ]
    spec = {"backendFramework": "trtllm", "components": components}
    return objects.named("nvidia.com/v1beta1", "DynamoGraphDeployment", what, spec)


def _worker(plan: Plan, what: Served, options: Options, data: dict[str, Any]) -> objects.Manifest:
    """The pod of a worker; the operator adds probes, ports and the environment to the container ``main``."""
    pod = objects.pod(plan, what, {})
    parsers = data["parsers"].get(plan.profile.reasoning.policy, {})
    arguments = ["--model-path", _CHECKPOINT, "--served-model-name", plan.name, "--extra-engine-args", _ARGUMENTS]
    for field, flag in (("reasoning", "--dyn-reasoning-parser"), ("tools", "--dyn-tool-call-parser")):
        arguments += [flag, parsers[field]] if field in parsers else []
    resources = objects.serving_container(what)["resources"]
    main = {
        "name": "main",
        "image": options.image or data["image"],
        "command": ["python3", "-m", "dynamo.trtllm"],
        "args": arguments,
        "resources": resources,
        "volumeMounts": [
            {"name": "checkpoint", "mountPath": _CHECKPOINT, "readOnly": True},
            {"name": "engine", "mountPath": _ARGUMENTS, "subPath": "engine.yaml", "readOnly": True},
        ],
    }
    return {
        "containers": [main],
        "volumes": [
            {
                "name": "checkpoint",
                "persistentVolumeClaim": {"claimName": f"{what.name}-checkpoint", "readOnly": True},
            },
            {"name": "engine", "configMap": {"name": f"{what.name}-engine"}},
        ],
        "affinity": pod["affinity"],
        "tolerations": pod["tolerations"],
    }
