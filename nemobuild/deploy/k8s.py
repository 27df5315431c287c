"""Kubernetes: a Deployment on one node, or a LeaderWorkerSet over several (see ``lws``), and what belongs to it.

Chosen so that each can be argued with:

* The startup probe lasts as long as ``nemobuild serve --timeout``; from then on a server whose engine went silent is
  out of the Service after 15 s and started again after three minutes: ``/health`` follows a watchdog that asks for
  tokens.
* The rollout adds a pod before it takes one away: where there is no card for it, the old pod goes on serving.
* The autoscaler counts requests in progress, not CPU: beyond ``max_batch_size`` they queue. It scales at 80 % of that,
  for a new pod takes minutes. An adapter must offer the gateway's gauge as a pod metric.
* Nothing is written but ``/tmp`` and shared memory, nobody is root, no capability, no token of the cluster's own API.
* The network policy lets the gateway's port in, and nothing out: serving needs no network.
"""

from __future__ import annotations

from nemobuild.deploy import lws, objects
from nemobuild.deploy.objects import Manifest
from nemobuild.deploy.served import KEYS_FILE, Options, Served, served
from nemobuild.deploy.text import document
from nemobuild.plan.planner import Plan

QUEUE_METRIC = "nemobuild_gateway_requests_in_progress"
_QUEUE_SHARE = 0.8
_HEAD = """\
{name} on Kubernetes, made by nemobuild from its plan.
    nemobuild key NAME --file {keys}
    kubectl create secret generic {label}-api-keys --from-file={keys}
    kubectl apply --filename kubernetes.yaml
The claim {label}-repository must hold the content of the model repository:
fill it once from a pod that mounts it. The image is made from the Dockerfile beside this file;
push it where the nodes find it, and name it with --image.
{more}"""
_ONE_NODE = f"The autoscaler needs a metrics adapter that offers {QUEUE_METRIC} per pod."
_NODES = """\
LeaderWorkerSet must be installed in the cluster, and the pods need a key for each other:
    ssh-keygen -t ed25519 -N '' -f id_ed25519 && cp id_ed25519.pub authorized_keys
    kubectl create secret generic {label}-ssh --from-file=id_ed25519 --from-file=authorized_keys"""


def manifests(plan: Plan, options: Options) -> dict[str, str]:
    """``{"kubernetes.yaml": text}``. Raises as ``served`` does."""
    what = served(plan, options)
    workload = deployment(plan, what) if what.nodes == 1 else lws.leader_worker_set(plan, what, options)
    all_of_it = [
        objects.service_account(what),
        objects.claim(what),
        workload,
        objects.service(what),
        objects.disruption_budget(what),
        objects.network_policy(what),
    ]
    if what.nodes == 1:  # several nodes more are a decision for a person
        all_of_it.append(autoscaler(plan, what, options))
    more = _ONE_NODE if what.nodes == 1 else _NODES.format(label=what.name)
    head = _HEAD.format(name=plan.name, label=what.name, keys=KEYS_FILE, more=more)
    return {"kubernetes.yaml": document(head, *all_of_it)}


def deployment(plan: Plan, what: Served) -> Manifest:
    container = objects.serving_container(what)
    return objects.named(
        "apps/v1",
        "Deployment",
        what,
        {
            "selector": {"matchLabels": objects.selector(what)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "progressDeadlineSeconds": what.ready_timeout_s + 600,
            "template": {"metadata": {"labels": objects.labels(what)}, "spec": objects.pod(plan, what, container)},
        },
    )


def autoscaler(plan: Plan, what: Served, options: Options) -> Manifest:
    target = max(1, int(plan.max_batch_size * _QUEUE_SHARE))
    return objects.named(
        "autoscaling/v2",
        "HorizontalPodAutoscaler",
        what,
        {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": what.name},
            "minReplicas": options.replicas,
            "maxReplicas": options.max_replicas,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": QUEUE_METRIC},
                        "target": {"type": "AverageValue", "averageValue": str(target)},
                    },
                }
            ],
            "behavior": {
                # One pod at a time, and not before the last one had the time to start.
                "scaleUp": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": _within(what, 1800)}]},
                "scaleDown": {
                    "stabilizationWindowSeconds": _within(what, 3600),
                    "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}],
                },
            },
        },
    )


def _within(what: Served, most_s: int) -> int:
    return min(most_s, what.ready_timeout_s)
