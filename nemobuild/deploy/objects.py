"""The Kubernetes objects that one node and several have in common; see ``k8s`` for what is chosen and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemobuild.deploy.served import GRACE_S, KEYS_FOLDER, REPOSITORY, TMP_BYTES, USER, Served
from nemobuild.engine.container import SHM_BYTES
from nemobuild.gateway.process import DEFAULT_PORT
from nemobuild.plan.planner import Plan
from nemobuild.triton.launch import DEFAULT_PORTS

Manifest = dict[str, Any]
_LEAVE_S = 10  # a pod that ends still gets requests until every node has heard of it
_ON_GPU_NODES = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def labels(what: Served) -> dict[str, str]:
    return {"app.kubernetes.io/name": what.name, "app.kubernetes.io/managed-by": "nemobuild"}


def selector(what: Served) -> dict[str, str]:
    return {"app.kubernetes.io/name": what.name}


def named(api: str, kind: str, what: Served, spec: Mapping[str, Any], name: str | None = None) -> Manifest:
    metadata = {"name": name or what.name, "labels": labels(what)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": dict(spec)}


def service_account(what: Served) -> Manifest:
    """Of its own, without rights, so that nothing is inherited from the namespace's default one."""
    account = named("v1", "ServiceAccount", what, {})
    del account["spec"]
    return account | {"automountServiceAccountToken": False}


def claim(what: Served) -> Manifest:
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": quantity(what.disk_bytes)}}}
    return named("v1", "PersistentVolumeClaim", what, spec, f"{what.name}-repository")


def pod(plan: Plan, what: Served, container: Manifest) -> Manifest:
    """The pod of one node's part of the model."""
    spec: Manifest = {
        "serviceAccountName": what.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {
                "name": "repository",
                "persistentVolumeClaim": {"claimName": f"{what.name}-repository", "readOnly": True},
            },
            {"name": "api-keys", "secret": {"secretName": f"{what.name}-api-keys", "defaultMode": 0o440}},
            {"name": "tmp", "emptyDir": {"sizeLimit": quantity(TMP_BYTES)}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": quantity(SHM_BYTES)}},
        ],
    }
    if plan.gpu is not None:
        spec |= {"affinity": {"nodeAffinity": _cards(plan)}, "tolerations": [_ON_GPU_NODES]}
    return spec


def serving_container(what: Served) -> Manifest:
    """The container that runs ``nemobuild serve``."""
    memory = quantity(what.memory_bytes)
    cards = {"nvidia.com/gpu": str(what.gpus)} if what.gpus else {}
    return {
        "name": "model",
        "image": what.image,
        "args": list(what.arguments),
        "ports": [{"name": "openai", "containerPort": DEFAULT_PORT}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {
            "requests": {"cpu": str(2 + 2 * what.gpus), "memory": memory} | cards,
            "limits": {"memory": memory} | cards,
        },
        **probes("/health", "openai", what),
        # Without it, requests that arrive while the pod leaves the Service would meet a closed port.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_LEAVE_S)]}}},
        "volumeMounts": [
            {"name": "repository", "mountPath": REPOSITORY, "readOnly": True},
            {"name": "api-keys", "mountPath": KEYS_FOLDER, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def probes(path: str, port: str, what: Served) -> Manifest:
    ask = {"httpGet": {"path": path, "port": port}, "timeoutSeconds": 8}
    return {
        "startupProbe": ask | {"periodSeconds": 10, "failureThreshold": what.ready_timeout_s // 10},
        "readinessProbe": ask | {"periodSeconds": 5, "failureThreshold": 3},
        "livenessProbe": ask | {"periodSeconds": 10, "failureThreshold": 18},
    }


def doors(what: Served) -> dict[str, int]:
    """Name and number of the ports that clients use."""
    if what.nodes > 1:
        return {"http": DEFAULT_PORTS[0], "grpc": DEFAULT_PORTS[1]}
    return {"openai": DEFAULT_PORT}


def service(what: Served) -> Manifest:
    chosen = selector(what) | ({"leaderworkerset.sigs.k8s.io/worker-index": "0"} if what.nodes > 1 else {})
    ports = [{"name": name, "port": port, "targetPort": name} for name, port in doors(what).items()]
    spec = {"type": "ClusterIP", "selector": chosen, "ports": ports}
    return named("v1", "Service", what, spec)


def disruption_budget(what: Served) -> Manifest:
    spec = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": selector(what)},
    }
    return named("policy/v1", "PodDisruptionBudget", what, spec)


def network_policy(what: Served) -> Manifest:
    """In: clients of the namespace, and Prometheus in ``monitoring``. Between the nodes of a set: everything."""
    peers = [
        {"podSelector": {}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    ]
    ports = [{"port": name, "protocol": "TCP"} for name in doors(what)]
    ingress: list[Manifest] = [{"from": peers, "ports": ports}]
    egress: list[Manifest] = []
    if what.nodes > 1:
        inside = {"podSelector": {"matchLabels": selector(what)}}
        ingress.append({"from": [inside]})
        names = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
        egress += [{"to": [inside]}, {"ports": names}]
    spec = {
        "podSelector": {"matchLabels": selector(what)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }
    return named("networking.k8s.io/v1", "NetworkPolicy", what, spec)


def quantity(count_bytes: int) -> str:
    return f"{count_bytes >> 30}Gi"


def _cards(plan: Plan) -> Manifest:
    """Nodes with the cards that the engine was built for, by the labels of NVIDIA's GPU feature discovery.

    The label of memory is in MiB; a card of the same name may report some less.
    """
    assert plan.gpu is not None
    major, minor = plan.gpu.sm
    wanted = [
        ("nvidia.com/gpu.compute.major", "In", str(major)),
        ("nvidia.com/gpu.compute.minor", "In", str(minor)),
        ("nvidia.com/gpu.memory", "Gt", str(int((plan.gpu.memory_bytes >> 20) * 0.99))),
    ]
    terms = [{"key": key, "operator": operator, "values": [value]} for key, operator, value in wanted]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": terms}]}}
