"""The Dockerfile of the serve-only image: the pinned base, nemobuild with its gateway, and a bill of materials.

It builds nothing and holds no weights. On NVIDIA's base, packages that are there already are used as they are: the
models inside Triton see them too, and TensorRT-LLM must keep the versions that it was tested with.
"""

from __future__ import annotations

from nemobuild import __version__
from nemobuild.deploy.served import USER, Options, served
from nemobuild.plan.planner import Plan

CPU_BASE = "python:3.11-slim-bookworm"
BILL = "/opt/nemobuild/sbom.cdx.json"

_TEXT = """\
# Serve-only image. Put nemobuild's wheel beside this file first, made from a checkout or taken from an index:
#     pip wheel --no-deps --wheel-dir . PATH_OR_NAME_OF_NEMOBUILD
# For the very same bytes on every day, give the base by digest: --build-arg BASE={base}@sha256:...
ARG BASE={base}
FROM ${{BASE}}
LABEL org.opencontainers.image.title="nemobuild-serve" \\
      org.opencontainers.image.version="{version}" \\
      org.opencontainers.image.licenses="Apache-2.0" \\
      org.opencontainers.image.base.name="{base}"
ENV PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
{system}COPY nemobuild-{version}-py3-none-any.whl /tmp/
RUN python3 -m venv{site} /opt/nemobuild \\
 && /opt/nemobuild/bin/pip install "/tmp/nemobuild-{version}-py3-none-any.whl[gateway]" \\
 && rm /tmp/nemobuild-{version}-py3-none-any.whl
{triton}# SSH and the shell ask who a user is, so it gets a name.
RUN useradd --uid {user} --no-create-home --home-dir /tmp --shell /bin/bash nemobuild
RUN /opt/nemobuild/bin/python -m nemobuild.deploy.sbom {base} > {bill}
ENV PATH=/opt/nemobuild/bin:${{PATH}} HOME=/tmp
USER {user}:{user}
WORKDIR /tmp
ENTRYPOINT ["nemobuild"]
CMD ["--help"]
"""
_CARRIED = """\
# The server of the cpu runtime, unpacked once, so that the container needs no network and no writable folder for it.
ENV NEMOBUILD_CACHE=/opt/nemobuild-cache
RUN /opt/nemobuild/bin/python -c "from nemobuild.triton.carrier import carried_triton; carried_triton()" \\
 && rm -r /opt/nemobuild-cache/wheels
"""
_PACKAGES = """\
RUN apt-get update && apt-get install -y --no-install-recommends {packages} \\
 && rm -rf /var/lib/apt/lists/* && mkdir -p /run/sshd
"""


def base_image(plan: Plan) -> str:
    return CPU_BASE if plan.toolchain is None else plan.toolchain.image


def dockerfile(plan: Plan, options: Options) -> str:
    """The Dockerfile for the runtime of ``plan``. The pods of one model on several nodes start each other's ranks."""
    on_cpu = plan.toolchain is None
    packages = [] if on_cpu else ["python3-venv"]
    if served(plan, options).nodes > 1:
        packages += ["openssh-client", "openssh-server"]
    return _TEXT.format(
        base=base_image(plan),
        version=__version__,
        system=_PACKAGES.format(packages=" ".join(packages)) if packages else "",
        site="" if on_cpu else " --system-site-packages",
        triton=_CARRIED if on_cpu else "",
        bill=BILL,
        user=USER,
    )
