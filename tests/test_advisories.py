"""The static list of advisories: its form, what it says of which container, and where it is shown."""

from __future__ import annotations

import datetime
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from nemobuild.cli.app import app
from nemobuild.doctor.software import check_advisories
from nemobuild.places import load_plan
from nemobuild.plan.advisories import advisories, open_advisories, read_on, summary
from nemobuild.plan.toolchain import load_toolchain, toolchains


def ids(tag: str | None) -> set[int]:
    return {a.id for a in open_advisories(None if tag is None else load_toolchain(tag))}


def test_the_list_is_well_formed() -> None:
    found = advisories()
    assert [a.date for a in found] == sorted(a.date for a in found)
    assert all(isinstance(a.date, datetime.date) and a.date <= read_on() for a in found)
    assert len({a.id for a in found}) == len(found)
    for advisory in found:
        assert advisory.cves and all(re.fullmatch(r"CVE-20\d\d-\d{4,7}", cve) for cve in advisory.cves)
        assert len(set(advisory.cves)) == len(advisory.cves)
        assert 0 < advisory.worst <= 10 and advisory.what.endswith(".") and advisory.product
        pattern = r"\d\d\.\d\d" if advisory.component == "triton" else r"\d+\.\d+\.\d+(rc\d+)?"
        assert re.fullmatch(pattern, advisory.fixed_in), advisory


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [
        ("26.07", {5840}),
        ("26.03", {5840}),
        ("26.02", {5840, 5828}),
        ("26.01", {5840, 5828, 5816}),
        ("25.09", {5840, 5828, 5816, 5790, 5734}),
        (None, {5828, 5816, 5790, 5734, 5723, 5691, 5687}),
    ],
)
def test_what_is_open_where(tag: str | None, wanted: set[int]) -> None:
    assert ids(tag) == wanted


def test_a_release_candidate_is_compared_as_one() -> None:
    chain = load_toolchain("26.07")
    for version, is_open in (("1.3.0rc16", True), ("1.3.0rc17", False), ("1.3.0", False), ("0.18.1", True)):
        assert (5840 in {a.id for a in open_advisories(replace(chain, trtllm=version))}) == is_open, version


def test_a_container_without_holes_is_not_spoken_of() -> None:
    assert summary(replace(load_toolchain("26.07"), trtllm="1.3.0")) == ""
    assert all("TensorRT-LLM 1.3.0rc17" in summary(chain) for chain in toolchains().values())
    assert summary(load_toolchain("26.02")).startswith("advisories: 20 known CVEs in container 26.02, the worst 9.8")


def test_doctor_shows_every_one_with_its_source() -> None:
    plan = load_plan("super-49b-v1.5-h100-fp8")
    (finding,) = check_advisories(plan)
    assert finding.level == "warning" and finding.exit_status == 0
    assert "1.3.0rc17" in finding.what and str(read_on()) in finding.why
    (fact,) = finding.facts["advisories"]
    assert fact["source"].endswith("/5840") and len(fact["cves"]) == 12
    (carried,) = check_advisories(None)
    assert "cpu runtime" in carried.what and "loopback" in carried.next


def test_build_shows_them() -> None:
    done = CliRunner().invoke(app, ["build", "super-49b-v1.5-h100-fp8", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "bulletin 5840" in done.stderr and "advisories" not in done.stdout
