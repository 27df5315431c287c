"""``deploy``: golden files, published schemas, and what the schemas cannot say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from nemobuild.cli.app import app
from nemobuild.config import profile_names
from nemobuild.deploy.image import dockerfile
from nemobuild.deploy.objects import serving_container
from nemobuild.deploy.sbom import bill
from nemobuild.deploy.served import Options, label, served
from nemobuild.deploy.write import deployment_files
from nemobuild.errors import DoesNotFit, UsageError
from nemobuild.places import load_plan
from nemobuild.plan.planner import Plan
from nemobuild.triton.carrier import carried_triton

GOLDEN = Path(__file__).parent / "golden" / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
# The oldest that is kept up somewhere, and the newest whose schemas the package holds.
KUBERNETES = ("1.30", "1.37")
FOREIGN = {"LeaderWorkerSet": "leaderworkerset", "DynamoGraphDeployment": "dynamographdeployment"}
SEVERAL_NODES = ("ultra-253b-v1-8xh100-fp8", Options(gpus_per_node=4))


def targets(plan: Plan) -> tuple[str, ...]:
    return ("compose", "k8s", "dynamo") if plan.profile.runtime == "llmapi" else ("compose", "k8s")


def check_kubernetes(item: dict[str, Any]) -> None:
    """Raise unless ``item`` is what its schema allows, with no unknown field."""
    if item["kind"] not in FOREIGN:
        for version in KUBERNETES:
            kubernetes_validate.validate(item, version, strict=True)
        return
    jsonschema.validate(item, json.loads((SCHEMAS / f"{FOREIGN[item['kind']]}.json").read_text()))
    for template in pod_templates(item["spec"]):
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        for version in KUBERNETES:
            kubernetes_validate.validate(whole, version, strict=True)


def pod_templates(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template at any depth."""
    if isinstance(value, dict):
        if "spec" in value and "containers" in value["spec"]:
            yield value
            return
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from pod_templates(item)


def objects(plan: Plan, target: str = "k8s", options: Options = Options()) -> list[dict[str, Any]]:  # noqa: B008
    name = {"k8s": "kubernetes.yaml", "dynamo": "dynamo.yaml"}[target]
    return list(yaml.safe_load_all(deployment_files(plan, target, options)[name]))


def kind(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [item for item in items if item["kind"] == name]
    return found


@pytest.mark.parametrize("name", profile_names())
def test_files_are_golden_and_fit_their_schemas(name: str) -> None:
    plan = load_plan(name)
    compose_schema = json.loads(
        files("check_jsonschema").joinpath("builtin_schemas", "vendor", "compose-spec.json").read_text()
    )
    for target in targets(plan):
        for file, text in deployment_files(plan, target, Options()).items():
            golden = GOLDEN / ("" if file == "Dockerfile" else name) / golden_name(plan, file)
            assert text == golden.read_text(), f"{golden} is stale; run `make generate`"
            if file == "compose.yaml":
                jsonschema.validate(yaml.safe_load(text), compose_schema)
            elif file != "Dockerfile":
                for item in yaml.safe_load_all(text):
                    check_kubernetes(item)


def golden_name(plan: Plan, file: str) -> str:
    """The Dockerfile is one for all profiles on one base."""
    return f"Dockerfile.{plan.toolchain.tag if plan.toolchain else 'cpu'}" if file == "Dockerfile" else file


def test_the_schemas_refuse_what_is_wrong() -> None:
    """A check that lets everything pass would make the test above worthless."""
    deployment = kind(objects(load_plan("super-49b-v1.5-h100-fp8")), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readOnly"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnly"):
        check_kubernetes(deployment)
    plan = load_plan("super-49b-v1.5-h100-fp8-llmapi")
    graph = kind(objects(plan, "dynamo"), "DynamoGraphDeployment")
    graph["spec"]["components"][1]["podTemplate"]["spec"]["containers"][0]["arguments"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="arguments"):
        check_kubernetes(graph)
    workers = kind(objects(load_plan(SEVERAL_NODES[0]), options=SEVERAL_NODES[1]), "LeaderWorkerSet")
    workers["spec"]["leaderWorkerTemplate"]["restartPolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="Always"):
        check_kubernetes(workers)


@pytest.mark.parametrize("name", profile_names())
def test_the_numbers_are_those_of_the_plan(name: str) -> None:
    plan = load_plan(name)
    what = served(plan, Options())
    items = objects(plan)
    container = kind(items, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    cards = 0 if plan.gpu is None else len(plan.ranks)
    assert container["resources"]["limits"].get("nvidia.com/gpu", "0") == str(cards)
    needed = (
        plan.ranks[0].total_bytes if plan.gpu is None else next(n for n in plan.host if n.stage == "serve").memory_bytes
    )
    assert int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30 > needed
    startup = container["startupProbe"]
    asked_s = int(container["args"][container["args"].index("--timeout") + 1])
    assert startup["periodSeconds"] * startup["failureThreshold"] == asked_s == what.ready_timeout_s
    scaler = kind(items, "HorizontalPodAutoscaler")
    per_pod = int(scaler["spec"]["metrics"][0]["pods"]["target"]["averageValue"])
    assert 0.7 * plan.max_batch_size <= per_pod <= plan.max_batch_size
    behavior = scaler["spec"]["behavior"]
    assert behavior["scaleUp"]["policies"][0]["periodSeconds"] <= 1800, "the API's own limits, which no schema has"
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] <= 3600
    compose = yaml.safe_load(deployment_files(plan, "compose", Options())["compose.yaml"])
    resources = compose["services"]["model"]["deploy"]["resources"]
    devices = resources.get("reservations", {}).get("devices", [])
    assert [device["count"] for device in devices] == [cards] * bool(cards)
    assert compose["services"]["model"]["command"] == container["args"]


def test_the_container_runs_a_line_that_serve_takes() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    for name in profile_names():
        program, *arguments = served(load_plan(name), Options()).arguments
        assert program == "serve"
        context = serve.make_context("serve", list(arguments))
        assert context.params["openai_host"] == "0.0.0.0"
        assert context.params["host"] == "127.0.0.1", "Triton itself is for the gateway only"


@pytest.mark.parametrize("case", [("super-49b-v1.5-h100-fp8", Options()), SEVERAL_NODES])
def test_pods_are_hardened_and_whole(case: tuple[str, Options]) -> None:
    items = objects(load_plan(case[0]), options=case[1])
    for item in items:
        if item["kind"] != "LeaderWorkerSet":  # checked with the others, but no shipped profile has one
            continue
        check_kubernetes(item)
    templates = [template for item in items for template in pod_templates(item)]
    assert len(templates) == served(load_plan(case[0]), case[1]).nodes
    names = {port for item in items if item["kind"] == "Service" for port in [item["spec"]["ports"][0]["targetPort"]]}
    assert names <= {port["name"] for port in templates[0]["spec"]["containers"][0]["ports"]}
    for template in templates:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and context["capabilities"] == {"drop": ["ALL"]}
        assert not context["allowPrivilegeEscalation"]
        mounts, volumes = container["volumeMounts"], {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in mounts} == set(volumes)
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
        writable = [mount["mountPath"] for mount in mounts if not mount.get("readOnly")]
        assert writable == ["/tmp", "/dev/shm"]
    assert "Secret" not in {item["kind"] for item in items}, "secrets are named, not written"


def test_several_nodes() -> None:
    plan = load_plan(SEVERAL_NODES[0])
    items = objects(plan, options=SEVERAL_NODES[1])
    workers = kind(items, "LeaderWorkerSet")
    template = workers["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    for role, program in (("leaderTemplate", "mpirun"), ("workerTemplate", "sshd")):
        (container,) = template[role]["spec"]["containers"]
        *shell, script = container["command"]
        assert shell == ["bash", "-c"] and program in script
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
        subprocess.run(["bash", "-n", "-c", script], check=True)
    assert "openssh-server" in dockerfile(plan, SEVERAL_NODES[1])
    with pytest.raises(UsageError, match="2 nodes") as failure:
        deployment_files(plan, "compose", SEVERAL_NODES[1])
    assert failure.value.next == "Use --to k8s."
    with pytest.raises(UsageError, match="evenly"):
        served(plan, Options(gpus_per_node=3))


def test_the_leader_names_the_pods_as_lws_does(tmp_path: Path) -> None:
    """``NAME-0.NAME.SPACE`` leads; its workers are ``NAME-0-1.NAME.SPACE`` and so on."""
    items = objects(load_plan(SEVERAL_NODES[0]), options=SEVERAL_NODES[1])
    leader = kind(items, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][0]
    script = leader["command"][2].split("exec mpirun")[0]
    script = re.sub(r"install .*\n|cd /repository\n", "", script).replace("/tmp/hosts", str(tmp_path / "hosts"))
    script = re.sub(r"until .*? 2>/dev/null", "until true", script)
    environment = {"PATH": "/usr/bin:/bin", "LWS_GROUP_SIZE": "3", "LWS_LEADER_ADDRESS": "big-0.big.space"}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    assert (tmp_path / "hosts").read_text().splitlines() == [
        "big-0.big.space slots=4",
        "big-0-1.big.space slots=4",
        "big-0-2.big.space slots=4",
    ]


def test_dynamo_gets_the_plans_limits_for_its_own_version() -> None:
    plan = load_plan("super-49b-v1.5-h100-fp8-llmapi")
    items = objects(plan, "dynamo")
    arguments = yaml.safe_load(kind(items, "ConfigMap")["data"]["engine.yaml"])
    assert arguments["max_batch_size"] == plan.max_batch_size
    assert arguments["max_seq_len"] == plan.profile.limits.max_context_tokens
    assert not {"backend", "sampler_type", "triton_config", "skip_tokenizer_init"} & set(arguments), "not known to 1.3"
    with pytest.raises(UsageError, match="llmapi only") as failure:
        deployment_files(load_plan("super-49b-v1.5-h100-fp8"), "dynamo", Options())
    assert "migrate" in failure.value.next


def test_what_does_not_fit_or_is_unknown_is_refused() -> None:
    with pytest.raises(DoesNotFit):
        served(load_plan("super-49b-v1.5-h200-bf16", "h100-sxm"), Options())
    plan = load_plan("smollm2-nas-cpu")
    with pytest.raises(UsageError, match="helm"):
        deployment_files(plan, "helm", Options())
    with pytest.raises(UsageError, match="replicas"):
        served(plan, Options(replicas=5))


def test_names_become_labels() -> None:
    assert label("super-49b-v1.5-h100-fp8") == "super-49b-v1-5-h100-fp8"
    assert label("8xH100_my model") == "m-8xh100-my-model"
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,62}", label("x" * 80 + "-repository"))


def test_a_larger_model_gets_more_memory_and_time() -> None:
    small, large = (served(load_plan(n), Options()) for n in ("nano-8b-v1-h100-bf16", "ultra-253b-v1-8xh200-bf16"))
    assert small.memory_bytes < large.memory_bytes and small.ready_timeout_s < large.ready_timeout_s
    assert serving_container(replace(small, gpus=3))["resources"]["limits"]["nvidia.com/gpu"] == "3"


def test_command_writes_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    target = tmp_path / "deploy"
    target.mkdir()
    (target / "api-keys.txt").write_text("name hash")
    arguments = ["deploy", "smollm2-nas-cpu", "--to", "compose", "-o", str(target), "--json"]
    for _ in range(2):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    assert sorted(path.name for path in target.iterdir()) == ["Dockerfile", "api-keys.txt", "compose.yaml"]
    assert [Path(path).name for path in json.loads(done.stdout)["files"]] == ["compose.yaml", "Dockerfile"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deploy"]


def test_bill_of_materials() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    base = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    made = bill(base, distributions(), [("libc6", "2.39-0ubuntu8.4"), ("g++", "4:13.2.0")])
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(made)) is None
    assert made["specVersion"] == SchemaVersion.V1_6.to_version()
    found = {item["name"]: item for item in made["components"]}
    assert found["TensorRT-LLM"]["version"] == "1.2.1"
    assert found["pydantic"]["purl"].startswith("pkg:pypi/pydantic@")
    assert found["g++"]["purl"] == "pkg:deb/g%2B%2B@4%3A13.2.0"
    assert made == bill(base, distributions(), [("g++", "4:13.2.0"), ("libc6", "2.39-0ubuntu8.4")]), "same bytes"
    made["components"][0]["type"] = "spaceship"
    assert validator.validate_str(json.dumps(made)) is not None


def test_an_unpacked_triton_needs_no_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the image of the cpu runtime nothing can be written, not even a lock."""
    first = carried_triton()

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("nemobuild.triton.carrier.file_lock", refused)
    assert carried_triton() == first
