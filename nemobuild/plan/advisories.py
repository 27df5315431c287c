"""Known holes in the pinned containers, as data with source and date: a static list, that never asks the network.

So it can only say what was known on the day it was read. The list is in ``engine_configs/advisories.yaml``.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from nemobuild.config import read_yaml
from nemobuild.plan.toolchain import Toolchain
from nemobuild.resources import data_folder

_PRODUCTS = {"triton": "Triton", "trtllm": "TensorRT-LLM"}


@dataclass(frozen=True, slots=True)
class Advisory:
    """One bulletin. ``worst`` is its highest CVSS 3.1 score, ``fixed_in`` a release of Triton or of TensorRT-LLM."""

    id: int
    date: datetime.date
    component: str
    fixed_in: str
    worst: float
    cves: tuple[str, ...]
    what: str

    @property
    def product(self) -> str:
        return _PRODUCTS[self.component]

    @property
    def source(self) -> str:
        return f"https://nvidia.custhelp.com/app/answers/detail/a_id/{self.id}"


def read_on() -> datetime.date:
    """When the list was read."""
    day = _data()["read_on"]
    assert isinstance(day, datetime.date)
    return day


def advisories() -> list[Advisory]:
    """The whole list, oldest first."""
    return [Advisory(**fields | {"cves": tuple(fields["cves"].split())}) for fields in _data()["bulletins"]]


def open_advisories(toolchain: Toolchain | None) -> list[Advisory]:
    """Those that are not fixed in ``toolchain``; ``None`` is the Triton that the cpu runtime carries. Worst first."""
    has = {"triton": str(_data()["carried_triton"]) if toolchain is None else toolchain.tag}
    if toolchain is not None:
        has["trtllm"] = toolchain.trtllm
    found = [a for a in advisories() if a.component in has and _version(has[a.component]) < _version(a.fixed_in)]
    return sorted(found, key=lambda advisory: -advisory.worst)


def summary(toolchain: Toolchain | None) -> str:
    """One line for people who build, or nothing: how many, the worst, and what would mend them."""
    found = open_advisories(toolchain)
    if not found:
        return ""
    where = "the Triton of the cpu runtime" if toolchain is None else f"container {toolchain.tag}"
    newest = {a.product: a.fixed_in for a in sorted(found, key=lambda a: _version(a.fixed_in))}
    mend = " and ".join(f"{product} {version}" for product, version in newest.items())
    count = sum(len(advisory.cves) for advisory in found)
    return (
        f"advisories: {count} known CVEs in {where}, the worst {found[0].worst} (bulletin {found[0].id}: "
        f"{found[0].what.rstrip('.')}); all fixed in {mend}. As of {read_on()}; see nemobuild doctor"
    )


def _version(text: str) -> tuple[int, ...]:
    """``1.3.0rc17`` comes before ``1.3.0``; ``26.03`` is a release of Triton."""
    numbers, _, candidate = text.partition("rc")
    return (*map(int, re.findall(r"\d+", numbers)), int(candidate) if candidate else 1 << 30)


@cache
def _data() -> dict[str, Any]:
    data = read_yaml(data_folder("engine_configs") / "advisories.yaml")
    assert isinstance(data, dict)
    return data
