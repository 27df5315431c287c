"""The store and the pipeline when things go wrong: killed anywhere, a full disk, a flipped bit, two at once."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemobuild.errors import IntegrityError, UsageError
from nemobuild.pipeline import build, stage_keys, steps
from nemobuild.store import Store
from nemobuild.store.listing import collect
from tests import templates
from tests.tiny import write_model
from tests.toolchains import enter, machine, write_profile

ROOT = Path(__file__).parents[1]
STAGES = ("snapshot", "checkpoint", "engine", "repository")
GPU = {"model": {"source": "org/tiny"}}
CPU = GPU | {"runtime": "cpu", "machine": None, "build": {}, "checkpoint__precision": "fp8"}
CPU |= {"checkpoint__calibration": {"samples": 2, "tokens_per_sample": 32}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    template = templates.SUPER_V15.replace("tool_notes", "''")
    return write_model(tmp_path_factory.mktemp("hf") / "tiny", template=template)


def fetched(folder, source, **changes):
    """A working folder with a profile and what ``fetch`` leaves for it."""
    snapshot = shutil.copytree(source, folder / "build" / "tiny" / "snapshot")
    files = {f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in snapshot.iterdir()}
    (snapshot / "source.json").write_text(json.dumps({"repo": "org/tiny", "commit": "a" * 40, "files": files}))
    write_profile(folder / "tiny.yaml", source, **changes)
    return folder


# What a compiler tells of its own run: its folder, its time, its memory.
TOLD = re.compile(r"engine/[^/]*?/?(config|manifest)\.json|repository/.*(manifest|tensorrt_llm/1/config)\.json")


def content(places):
    """All bytes of the artefacts in ``places``, by path, but what an engine's compiler tells of its run."""
    files = [f for stage in STAGES for f in sorted((places / stage).rglob("*")) if f.is_file()]
    found = {str(f.relative_to(places)): f.read_bytes() for f in files}
    return {name: data for name, data in found.items() if not ((places / "engine").exists() and TOLD.fullmatch(name))}


def objects(folder):
    """All bytes of the objects of a store, by path; without their records, which tell times."""
    found = content(folder / "build" / "store" / "objects")
    return {name: data for name, data in found.items() if name.count("/") > 1}


def die(mode, template, work, points):
    environment = machine(work / "machine") | {"STANDIN_CALLS": os.devnull}
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    command = [sys.executable, "-m", "tests.dying", mode, str(template), str(work), "tiny.yaml", *points]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, *found = map(json.loads, done.stdout.splitlines())
    assert whole["ended"] == 0 and whole["operations"] > 100, done.stderr
    assert len(found) == len(points), done.stderr
    return found, done.stderr


SHARES = [f"{share:.4f}" for share in random.Random(6).choices([k / 997 for k in range(1, 997)], k=26)]
BOUNDARIES = [f"step:{k}" for k in range(1, 7)]


@pytest.mark.parametrize(
    ("changes", "points"), [(GPU, BOUNDARIES + SHARES[:12]), (CPU, BOUNDARIES[:4] + SHARES[12:])], ids=["gpu", "cpu"]
)
def test_a_build_that_is_killed_anywhere_ends_the_same(source, tmp_path, changes, points):
    template = fetched(tmp_path / "template", source, **changes)
    found, said = die("kill", template, tmp_path, points)
    assert [one["died"] for one in found] == [-signal.SIGKILL] * len(points), said
    assert [one["ended"] for one in found] == [0] * len(points), said
    expected, stored = content(tmp_path / "whole" / "build" / "tiny"), objects(tmp_path / "whole")
    assert len(expected) > 20 and len(stored) == len(expected)
    for point in points:
        folder = tmp_path / point.replace(":", "-")
        assert content(folder / "build" / "tiny") == expected and objects(folder) == stored, point
        left = [path.name for path in (folder / "build" / "tiny").iterdir() if ".partial" in path.name]
        assert not left, (point, left)


def test_taking_from_the_store_that_is_killed_anywhere_ends_the_same(here, tmp_path):
    """All stages are stored, and none is in its place."""
    template, points = tmp_path / "template", [*BOUNDARIES[::2], *SHARES[:6]]
    (template / "build" / "tiny").mkdir(parents=True)
    shutil.copy(here / "tiny.yaml", template)
    shutil.copytree(here / "build" / "store", template / "build" / "store")
    shutil.copytree(here / "build" / "tiny" / "snapshot", template / "build" / "tiny" / "snapshot")
    shutil.rmtree(here / "machine")
    found, said = die("kill", template, tmp_path, points)
    assert [(one["died"], one["ended"]) for one in found] == [(-signal.SIGKILL, 0)] * len(points), said
    for point in ("whole", *points):
        folder = tmp_path / point.replace(":", "-")
        assert content(folder / "build" / "tiny") == content(here / "build" / "tiny"), point
        assert objects(folder) == objects(here), point
        assert {"checkpoint", "engine", "repository"} <= {f.name for f in (folder / "build" / "tiny").iterdir()}
    assert "engine.log" not in os.listdir(tmp_path / "whole" / "build" / "tiny"), "nothing was made"


def test_a_full_disk_is_told_and_nothing_half_is_left(source, tmp_path):
    points = SHARES[:8]
    found, said = die("full", fetched(tmp_path / "template", source, **GPU), tmp_path, points)
    assert {one["died"] for one in found} <= {0, 3} and [one["ended"] for one in found] == [0] * len(points), said
    failed = [one for one in found if one["died"] == 3]  # after the last byte was written nothing is needed
    assert said.count("The disk is full") == len(failed) > len(points) / 2 and "Traceback" not in said
    for point in points:
        assert objects(tmp_path / point) == objects(tmp_path / "whole"), point


def test_a_slow_file_system_changes_nothing(source, tmp_path):
    """A hundredth of a second for each operation that changes a file, as on a network's."""
    found, said = die("slow", fetched(tmp_path / "template", source, **GPU), tmp_path, ["1"])
    assert [(one["died"], one["ended"]) for one in found] == [(0, 0)], said
    assert content(tmp_path / "1" / "build" / "tiny") == content(tmp_path / "whole" / "build" / "tiny")
    assert objects(tmp_path / "1") == objects(tmp_path / "whole")


def flip(file, at=None):
    """Turn one bit of ``file`` around; its size, and its time, stay."""
    kept, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))


@pytest.fixture
def here(source, tmp_path, monkeypatch):
    """A build of all stages, in the working folder."""
    monkeypatch.chdir(tmp_path)
    enter(monkeypatch, machine(tmp_path / "machine"))
    fetched(tmp_path, source, **GPU)
    build("tiny.yaml")
    return tmp_path


def calls(here):
    return len((here / "machine" / "calls").read_text().splitlines())


def test_a_flipped_bit_in_any_file_is_found_before_it_is_used(here):
    store, keys = Store(), stage_keys("tiny.yaml")
    assert list(keys) == list(STAGES)
    for stage, key in keys.items():
        files = [f for f in sorted(store.path(stage, key).rglob("*")) if f.is_file() and f.stat().st_size]
        for file in files:
            before = file.read_bytes()
            flip(file)
            for use in (store.verify, lambda s, k: store.restore(s, k, here / "elsewhere")):
                with pytest.raises(IntegrityError, match=re.escape(f"{file.name} has other bytes")) as caught:
                    use(stage, key)
                assert caught.value.code == "tampered" and not (here / "elsewhere").exists()
            file.write_bytes(before)
        store.verify(stage, key)
        flip(store.record_file(stage, key))
        with pytest.raises(IntegrityError, match="is not as it was written"):
            store.verify(stage, key)
        flip(store.record_file(stage, key))


@pytest.mark.parametrize(
    ("damage", "change", "found"),
    [
        ("checkpoint/rank0.safetensors", {"limits__max_batch_size": 4}, "checkpoint"),
        ("engine/rank0.engine", {"reasoning__default": "off"}, "engine"),
    ],
)
@pytest.mark.parametrize("also_stored", [False, True])
def test_what_was_damaged_in_its_place_goes_no_further(here, source, damage, change, found, also_stored):
    """From the store when it is whole there, else made anew."""
    whole, key = content(here / "build" / "tiny"), stage_keys("tiny.yaml")[found]
    flip(here / "build" / "tiny" / damage)
    if also_stored:
        flip(Store().path(found, key) / damage.partition("/")[2])
    write_profile(here / "tiny.yaml", source, **GPU, **change)
    done = {step.stage: step for step in build("tiny.yaml")}
    assert done[found].action == ("remake" if also_stored else "reuse"), done
    assert any("has other bytes" in why for why in done[found].why)
    assert (here / "build" / "tiny" / damage).read_bytes() == whole[damage]
    Store().verify(found, key)


def test_a_damaged_snapshot_is_put_back_before_it_is_converted(here, source):
    file = here / "build" / "tiny" / "snapshot" / "model-00001-of-00002.safetensors"
    before = file.read_bytes()
    flip(file, -8)
    write_profile(here / "tiny.yaml", source, **GPU, checkpoint__precision="fp8", build__gemm_plugin="fp8")
    build("tiny.yaml")
    assert file.read_bytes() == before
    flip(file, -8)
    flip(Store().path("snapshot", stage_keys("tiny.yaml")["snapshot"]) / file.name, -8)
    write_profile(here / "tiny.yaml", source, **GPU, checkpoint__tensor_parallel=2, machine__count=2)
    with pytest.raises(IntegrityError, match=re.escape(f"{file.name} has other bytes")):
        build("tiny.yaml")


def test_two_builds_that_share_a_store_make_each_artefact_once(source, tmp_path):
    environment = machine(tmp_path / "machine") | {"NEMOBUILD_STORE": str(tmp_path / "store")}
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    folders = [fetched(tmp_path / name, source, **GPU) for name in ("one", "two")]
    command = [sys.executable, "-m", "nemobuild", "build", "tiny.yaml", "--json"]
    both = [subprocess.Popen(command, cwd=f, env=environment, stdout=subprocess.PIPE, text=True) for f in folders]
    said = [json.loads(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    actions = [sorted(step["action"] for step in steps) for steps in zip(*said, strict=True)]
    assert actions == [["make", "reuse"]] * 3 and calls(tmp_path) == 1
    assert content(folders[0] / "build" / "tiny") == content(folders[1] / "build" / "tiny")


def test_a_lock_of_a_dead_process_holds_nobody(here):
    store, key = Store(), stage_keys("tiny.yaml")["engine"]
    pid = os.fork()
    if pid == 0:
        with store.lock(f"engine-{key}"), store.making("engine", key), store.lock("published"):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    (here / "build" / "tiny" / "engine" / "rank0.engine").unlink()
    assert {step.stage: step.action for step in build("tiny.yaml")}["engine"] == "reuse"
    assert store.publish("tiny", stage_keys("tiny.yaml"), revision=None, gates="not run", note="").number == 1


def test_a_store_that_can_only_be_read_is_read(here, source, monkeypatch):
    """What is in it is used; what is not is refused before it is made."""
    shutil.rmtree(here / "build" / "tiny" / "engine")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(Store().root)))
    monkeypatch.setattr(Store, "lock", lambda *_: pytest.fail("it cannot be locked"))
    before = {p: p.stat().st_mtime_ns for p in Store().root.rglob("*")}
    assert [step.action for step in build("tiny.yaml")] == ["keep", "reuse", "keep"]
    assert [step.action for step in build("tiny.yaml")] == ["keep"] * 3 and len(stage_keys("tiny.yaml")) == 4
    write_profile(here / "tiny.yaml", source, **GPU, limits__max_batch_size=4)
    with pytest.raises(UsageError, match="Not permitted to write to the store") as caught:
        build("tiny.yaml")
    assert "NEMOBUILD_STORE" in caught.value.next and calls(here) == 1
    assert {p: p.stat().st_mtime_ns for p in Store().root.rglob("*")} == before


def test_a_clock_that_is_wrong_changes_nothing(here):
    for path in [*(here / "build").rglob("*")]:
        os.utime(path, (4e9, 4e9) if path.name < "m" else (1e6, 1e6))  # in a hundred years, and in 1970
    assert {step.action for step in steps("tiny.yaml")} == {"keep"}
    assert collect(Store(), older_than_s=0) == []
