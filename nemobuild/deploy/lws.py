"""Several nodes: a LeaderWorkerSet whose leader starts all ranks by MPI, over SSH between the pods.

The leader waits for its workers, writes a host file and runs the very line that ``serve_line`` gives; Open MPI takes
host file and SSH options from its environment. Here Triton itself is the endpoint: the gateway stands before a server
on its own machine. So only pods of the namespace reach it, and the routes that could load models stay closed. The
secret NAME-ssh holds ``id_ed25519`` and ``authorized_keys``. Made after the documentation; not run on a cluster by us.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from nemobuild.deploy import objects
from nemobuild.deploy.served import REPOSITORY, Options, Served
from nemobuild.plan.planner import Plan
from nemobuild.triton.launch import DEFAULT_PORTS, Endpoint, serve_line

_SSH_PORT = 2222
_SSH = "/run/nemobuild-ssh"
_WORKER = f"""\
ssh-keygen -q -t ed25519 -N '' -f /tmp/host_key
exec /usr/sbin/sshd -D -e -f /dev/null -p {_SSH_PORT} -h /tmp/host_key -o PidFile=none -o UsePAM=no \\
  -o StrictModes=no -o PasswordAuthentication=no -o AuthorizedKeysFile={_SSH}/authorized_keys
"""
_LEADER = f"""\
set -eu
install -m 600 {_SSH}/id_ed25519 /tmp/id
: > /tmp/hosts
i=0
while [ "$i" -lt "$LWS_GROUP_SIZE" ]; do
  host=$LWS_LEADER_ADDRESS
  [ "$i" = 0 ] || host=$(echo "$LWS_LEADER_ADDRESS" | sed "s/\\./-$i./")
  [ "$i" = 0 ] || until (exec 3<>"/dev/tcp/$host/{_SSH_PORT}") 2>/dev/null; do sleep 2; done
  echo "$host slots={{gpus}}" >> /tmp/hosts
  i=$((i + 1))
done
cd {REPOSITORY}
exec {{line}}
"""
_MPI = {
    "OMPI_MCA_orte_default_hostfile": "/tmp/hosts",
    "OMPI_MCA_plm_rsh_args": f"-p {_SSH_PORT} -i /tmp/id -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
    "OMPI_MCA_mca_base_env_list": "PATH;LD_LIBRARY_PATH;HOME",
}


def leader_worker_set(plan: Plan, what: Served, options: Options) -> objects.Manifest:
    """``what.nodes`` pods to a group, each with ``what.gpus`` cards."""
    endpoint = Endpoint("0.0.0.0", *DEFAULT_PORTS)
    line = serve_line(plan.profile.runtime, len(plan.ranks), Path(REPOSITORY), endpoint)
    leader = _container(what, _LEADER.format(gpus=what.gpus, line=shlex.join(line)))
    leader["ports"] = [{"name": name, "containerPort": port} for name, port in objects.doors(what).items()]
    leader["env"] = [{"name": name, "value": value} for name, value in _MPI.items()]
    leader |= objects.probes("/v2/health/ready", "http", what)
    worker = _container(what, _WORKER)
    worker["ports"] = [{"name": "ssh", "containerPort": _SSH_PORT}]
    template: dict[str, Any] = {
        "size": what.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",  # one rank lost is the model lost
        "leaderTemplate": _template(plan, what, leader),
        "workerTemplate": _template(plan, what, worker),
    }
    spec = {"replicas": options.replicas, "startupPolicy": "LeaderCreated", "leaderWorkerTemplate": template}
    return objects.named("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", what, spec)


def _template(plan: Plan, what: Served, container: objects.Manifest) -> objects.Manifest:
    spec = objects.pod(plan, what, container)
    spec["volumes"] = [volume for volume in spec["volumes"] if volume["name"] != "api-keys"]
    spec["volumes"].append({"name": "ssh", "secret": {"secretName": f"{what.name}-ssh", "defaultMode": 0o440}})
    return {"metadata": {"labels": objects.labels(what)}, "spec": spec}


def _container(what: Served, script: str) -> objects.Manifest:
    container = objects.serving_container(what)
    for field in ("args", "startupProbe", "readinessProbe", "livenessProbe"):
        del container[field]
    mounts = [mount for mount in container["volumeMounts"] if mount["name"] != "api-keys"]
    mounts.append({"name": "ssh", "mountPath": _SSH, "readOnly": True})
    return container | {"command": ["bash", "-c", script], "volumeMounts": mounts}
