"""A bill of materials in CycloneDX's form: what is in the image, as the image itself says.

Run inside the image while it is built (``python -m nemobuild.deploy.sbom BASE > FILE``): Python packages from their
metadata, Debian packages from dpkg, the base by name, and from the toolchain matrix what that base is known to hold.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from typing import Any
from urllib.parse import quote

from nemobuild import __version__
from nemobuild.plan.toolchain import Toolchain, toolchains

SPEC_VERSION = "1.6"


def bill(base: str, packages: Iterable[Distribution], debian: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """The document. Without time and serial number: the same image gives the same bytes."""
    toolchain = next((known for known in toolchains().values() if known.image == base), None)
    components = [_container(base), *_vendor(toolchain)]
    components += [_python(name, version) for name, version in sorted({_identity(p) for p in packages})]
    components += [_component("library", n, v, f"pkg:deb/{quote(n)}@{quote(v)}") for n, v in sorted(set(debian))]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": {"component": _component("container", "nemobuild-serve", __version__, None)},
        "components": components,
    }


def debian_packages() -> list[tuple[str, str]]:
    """Name and version of all that dpkg installed; nothing where there is no dpkg."""
    command = ["dpkg-query", "--show", "--showformat=${Package} ${Version}\\n"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [(name, version) for name, _, version in (line.partition(" ") for line in lines) if version]


def _component(kind: str, name: str, version: str, purl: str | None) -> dict[str, Any]:
    reference = purl or f"{name}@{version}"
    fields = {"type": kind, "bom-ref": reference, "name": name, "version": version}
    return fields if purl is None else fields | {"purl": purl}


def _container(base: str) -> dict[str, Any]:
    name, _, tag = base.rpartition(":")
    return _component("container", name, tag, f"pkg:docker/{quote(name)}@{quote(tag)}")


def _vendor(toolchain: Toolchain | None) -> list[dict[str, Any]]:
    if toolchain is None:
        return []
    known = {"TensorRT-LLM": toolchain.trtllm, "TensorRT": toolchain.tensorrt, "CUDA": toolchain.cuda}
    return [_component("library", name, version, None) for name, version in known.items() if version]


def _identity(package: Distribution) -> tuple[str, str]:
    return re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower(), package.version


def _python(name: str, version: str) -> dict[str, Any]:
    return _component("library", name, version, f"pkg:pypi/{name}@{quote(version)}")


if __name__ == "__main__":
    print(json.dumps(bill(sys.argv[1], distributions(), debian_packages()), indent=1))
