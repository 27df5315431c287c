"""``nemobuild build``: what is done is kept, what changed is said by name, and no more than that is made anew."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from nemobuild.errors import DoesNotFit, UsageError
from nemobuild.pipeline import Options, build, commands, steps
from nemobuild.places import load_plan
from tests import templates
from tests.test_process import wait_for
from tests.tiny import write_model
from tests.toolchains import STANDINS, enter, machine, write_profile


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    template = templates.SUPER_V15.replace("tool_notes", "''")
    return write_model(tmp_path_factory.mktemp("hf") / "tiny", template=template)


@pytest.fixture
def here(source, tmp_path, monkeypatch):
    """A machine with TensorRT-LLM, and a profile in the working folder."""
    monkeypatch.chdir(tmp_path)
    enter(monkeypatch, machine(tmp_path / "machine"))
    write_profile(tmp_path / "tiny.yaml", source)
    return tmp_path


def command_environment() -> dict[str, str]:
    """The environment of a command, with the stand-in of the driver before all else."""
    paths = [str(STANDINS / "driver"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nemobuild", "build", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=command_environment() | more,
    )


def actions(found):
    return {step.stage: step.action for step in found}


def cpu_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def calls(here):
    path = here / "machine" / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_the_second_build_does_no_work(here):
    done = run("tiny.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert {s["stage"]: s["action"] for s in json.loads(done.stdout)} == dict.fromkeys(
        ("checkpoint", "engine", "repository"), "make"
    )
    assert done.stderr == "" and calls(here) == 1
    before = {p: p.stat().st_mtime_ns for p in (here / "build").rglob("*")}
    used_s = cpu_seconds_of_children()
    again = run("tiny.yaml", PATH="/usr/bin:/bin")  # it needs no tools either
    used_s = cpu_seconds_of_children() - used_s
    assert again.returncode == 0 and again.stdout.count("kept") == 3, again.stdout + again.stderr
    assert all(line.startswith("advisories: ") for line in again.stderr.splitlines())
    assert used_s < 1.5  # about 0.5; other tests share the machine
    assert {p: p.stat().st_mtime_ns for p in (here / "build").rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "remade", "field"),
    [
        ({"limits__max_batch_size": 4}, ("engine", "repository"), "max_batch_size 8 -> 4"),
        ({"limits__max_context_tokens": 256}, ("engine", "repository"), "max_seq_len 512 -> 256"),
        ({"build__max_num_tokens": 2048}, ("engine", "repository"), "max_num_tokens 1024 -> 2048"),
        ({"build__multiple_profiles": True}, ("engine", "repository"), "multiple_profiles disable -> enable"),
        ({"machine__container": "26.02"}, ("engine", "repository"), "trtllm 1.2.1 -> 1.1.0"),
        ({"machine__gpu": "h100-pcie"}, ("engine", "repository"), "gpu h100-sxm -> h100-pcie"),
        ({"reasoning__default": "off"}, ("repository",), "reasoning.default on -> off"),
        ({"limits__default_max_tokens": 32}, ("repository",), "limits.default_max_tokens 64 -> 32"),
        ({"quality__max_divergence": 0.2}, (), ""),
        ({"build__timeout_s": 99}, ("repository",), "build.timeout_s 14400 -> 99"),
        ({"checkpoint__precision": "fp8"}, ("checkpoint", "engine", "repository"), "precision bf16 -> fp8"),
    ],
)
def test_a_change_makes_anew_what_depends_on_it_and_names_the_field(here, source, changes, remade, field):
    build("tiny.yaml")
    write_profile(here / "tiny.yaml", source, **changes)
    found = steps("tiny.yaml")
    assert [s.stage for s in found if s.action != "keep"] == list(remade)
    if remade:
        first = next(s for s in found if s.action != "keep")
        assert any(field in reason for reason in first.why), first.why
        later = [s for s in found if s.action != "keep"][1:]
        assert all(s.why for s in later)


def test_a_rebuilt_engine_reaches_the_repository(here, source):
    build("tiny.yaml")
    engine = here / "build" / "tiny" / "engine" / "rank0.engine"
    before = engine.stat().st_ino
    write_profile(here / "tiny.yaml", source, limits__max_batch_size=4)
    done = build("tiny.yaml")
    assert actions(done) == {"checkpoint": "keep", "engine": "remake", "repository": "remake"}
    assert calls(here) == 2 and engine.stat().st_ino != before
    repository = here / "build" / "tiny" / "repository"
    assert (
        json.loads((repository / "tensorrt_llm" / "1" / "config.json").read_text())["build_config"]["max_batch_size"]
        == 4
    )
    assert actions(build("tiny.yaml")) == dict.fromkeys(("checkpoint", "engine", "repository"), "keep")
    assert sorted(p.name for p in (here / "build" / "tiny").iterdir()) == [
        ".build.lock",
        ".profile",
        "checkpoint",
        "engine",
        "engine.log",
        "repository",
    ]


def test_other_weights_make_everything_anew(here, source):
    mine = shutil.copytree(source, here / "hf")
    write_profile(here / "tiny.yaml", mine)
    build("tiny.yaml")
    write_model(mine, seed=1, template=templates.SUPER_V15.replace("tool_notes", "''"))
    done = steps("tiny.yaml")
    assert actions(done) == dict.fromkeys(("checkpoint", "engine", "repository"), "remake")
    assert done[0].why[0].startswith("source ") and done[1].why == ("checkpoint is made anew",)
    build("tiny.yaml")
    assert actions(steps("tiny.yaml")) == dict.fromkeys(("checkpoint", "engine", "repository"), "keep")


def test_a_new_chat_template_rewrites_the_repository_only(here, source):
    mine = shutil.copytree(source, here / "hf")
    write_profile(here / "tiny.yaml", mine)
    build("tiny.yaml")
    file = mine / "tokenizer_config.json"
    file.write_text(file.read_text().replace("<|eot_id|>", "<|end_of_text|>", 1))
    found = steps("tiny.yaml")
    assert actions(found) == {"checkpoint": "keep", "engine": "keep", "repository": "remake"}
    assert found[-1].why[0].startswith("tokenizer and template ")


def test_a_damaged_artefact_is_made_anew(here):
    build("tiny.yaml")
    shutil.rmtree(here / "build" / "store")
    (here / "build" / "tiny" / "engine" / "rank0.engine").write_bytes(b"short")
    found = steps("tiny.yaml")
    assert actions(found) == {"checkpoint": "keep", "engine": "remake", "repository": "remake"}
    assert found[1].why == ("rank0.engine is missing or was changed",)
    (here / "build" / "tiny" / "checkpoint" / "manifest.json").write_text("{")
    assert steps("tiny.yaml")[0].action == "remake"


def test_a_damaged_artefact_comes_back_from_the_store(here):
    build("tiny.yaml")
    engine = here / "build" / "tiny" / "engine" / "rank0.engine"
    before = engine.read_bytes()
    engine.write_bytes(b"short")
    shutil.rmtree(here / "build" / "tiny" / "repository")
    done = run("tiny.yaml", PATH="/usr/bin:/bin")  # nothing is built, so nothing is needed for it
    assert done.returncode == 0 and done.stdout.count("reused from the store") == 2, done.stdout + done.stderr
    assert "engine: rank0.engine is missing or was changed; reused from the store" in done.stderr
    assert engine.read_bytes() == before and calls(here) == 1


def test_what_was_built_before_is_not_built_again(here, source):
    build("tiny.yaml")
    write_profile(here / "tiny.yaml", source, limits__max_batch_size=4)
    build("tiny.yaml")
    write_profile(here / "tiny.yaml", source)
    assert actions(steps("tiny.yaml")) == {"checkpoint": "keep", "engine": "reuse", "repository": "reuse"}
    assert actions(build("tiny.yaml")) == {"checkpoint": "keep", "engine": "reuse", "repository": "reuse"}
    assert calls(here) == 2
    config = here / "build" / "tiny" / "repository" / "tensorrt_llm" / "1" / "config.json"
    assert json.loads(config.read_text())["build_config"]["max_batch_size"] == 8


@pytest.mark.parametrize(
    ("stage", "manifest"),
    [
        ("engine", {"inputs": 5, "files": [1]}),
        ("engine", {"inputs": {}, "files": {"config.json": {"x": 1}}}),
        ("engine", {"files": {}}),
        ("checkpoint", {"inputs": {"form": 3}, "files": {}}),
        ("checkpoint", {"inputs": {"calibration": 3}, "files": {}}),
        ("checkpoint", {"inputs": {"tools": "all"}, "files": {}}),
        ("repository", {"inputs": {"engine": 1}, "files": {"README.md": None}}),
    ],
)
def test_a_manifest_of_another_form_counts_as_damaged(here, stage, manifest):
    folder = here / "build" / "tiny" / stage
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = {step.stage: step for step in steps("tiny.yaml")}[stage]
    assert (found.action, found.why) == ("remake", ("its manifest.json is missing or damaged",))


def test_a_manifest_with_a_name_that_no_file_can_have(here):
    folder = here / "build" / "tiny" / "engine"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"inputs": {"gpu": "x"}, "files": {"a\0b": 1}}))
    assert "is missing or was changed" in steps("tiny.yaml")[1].why[-1]


A, B = "a" * 40, "b" * 40


def fetched(here, source, **record):
    """What ``fetch`` leaves for the profile ``tiny``."""
    folder = shutil.copytree(source, here / "build" / "tiny" / "snapshot")
    if record:
        (folder / "source.json").write_text(json.dumps(record | {"files": {}}))


@pytest.mark.parametrize(
    ("record", "model", "words"),
    [
        ({"repo": "org/a", "commit": A}, {"source": "org/b"}, f"org/a at {A}; the profile names org/b."),
        ({"repo": "org/a", "commit": A}, {"source": "org/a", "revision": B}, f"names org/a at {B}."),
        ({"repo": "org/a", "commit": A}, {"source": "package:smollm2-nas"}, "names package:smollm2-nas."),
        ({"package": "x==1", "form": "llama"}, {"source": "package:smollm2-nas"}, "holds package:smollm2-llama;"),
        ({}, {"source": "org/a"}, "holds something unknown;"),
    ],
)
def test_a_snapshot_of_another_source_is_not_served(here, source, record, model, words):
    fetched(here, source, **record)
    write_profile(here / "tiny.yaml", source, model=model)
    for begin in (steps, build):
        with pytest.raises(UsageError, match=re.escape(words)) as caught:
            begin("tiny.yaml")
        assert caught.value.code == "another-source" and "`nemobuild fetch tiny.yaml`" in caught.value.next
    assert not (here / "build" / "tiny" / "checkpoint").exists()


@pytest.mark.parametrize("revision", [None, "main", A])
def test_a_snapshot_of_the_source_is_taken(here, source, revision):
    fetched(here, source, repo="org/a", commit=A)
    write_profile(here / "tiny.yaml", source, model={"source": "org/a", "revision": revision})
    assert actions(steps("tiny.yaml"))["checkpoint"] == "make"


def test_weights_of_another_model_than_the_planned_one_go_no_further(here, source):
    write_profile(here / "tiny.yaml", source, model={"source": str(source), "known": "nano-8b-v1"})
    write_profile(here / "cpu.yaml", source, runtime="cpu", machine=None, build={}, model__known="smollm2-llama")
    for name in ("tiny.yaml", "cpu.yaml"):
        done = run(name, "--json")
        assert done.returncode == 5 and json.loads(done.stderr)["error"]["code"] == "another-model", done.stderr
    assert not (here / "build").exists()


def test_two_profiles_of_one_file_name_do_not_share_a_folder(here, source):
    (here / "other").mkdir()
    write_profile(here / "other" / "tiny.yaml", source)
    build("tiny.yaml")
    for begin in (steps, build):
        with pytest.raises(UsageError, match="belongs to the profile") as caught:
            begin("other/tiny.yaml")
        assert str(here / "tiny.yaml") in caught.value.what and str(here / "other" / "tiny.yaml") in caught.value.what
    with pytest.raises(UsageError, match="no profile 'tiny'"):
        build("tiny")
    (here / "tiny.yaml").rename(here / "other" / "tiny.yaml")
    assert set(actions(build("other/tiny.yaml")).values()) == {"keep"}, "a profile that was moved"


def test_a_repository_that_was_emitted_by_hand_is_kept(here, source):
    build("tiny.yaml")
    shutil.rmtree(here / "build" / "tiny" / "repository")
    emit = [sys.executable, "-m", "nemobuild", "repo", "tiny.yaml"]
    subprocess.run(emit, check=True, capture_output=True, env=command_environment())
    assert actions(steps("tiny.yaml"))["repository"] == "keep"
    shutil.rmtree(here / "build" / "tiny" / "repository")
    subprocess.run([*emit, "--source", str(source)], check=True, capture_output=True, env=command_environment())
    assert steps("tiny.yaml")[-1].why == ("it does not say what it was made from",)


def test_a_timing_cache_that_is_asked_for_is_an_input(here):
    build("tiny.yaml")
    (here / "mine.cache").write_text("timings\n8x1024x512")
    found = steps("tiny.yaml", Options(timing_cache=here / "mine.cache"))
    assert found[1].why[0].startswith("timing_cache none -> ")
    done = build("tiny.yaml", Options(timing_cache=here / "mine.cache"))
    assert actions(done)["engine"] == "remake"
    assert "hit of 1" in (here / "build" / "tiny" / "engine.log").read_text()
    assert actions(build("tiny.yaml", Options(timing_cache=here / "mine.cache")))["engine"] == "keep"
    assert actions(build("tiny.yaml"))["engine"] == "keep", "the same timings, without a word"


def test_a_build_that_was_killed_goes_on(here):
    pid = here / "machine" / "pid"
    environment = command_environment() | {"STANDIN_FAIL": "hang", "STANDIN_PID": str(pid)}
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        pid.unlink(missing_ok=True)
        ours = subprocess.Popen(
            [sys.executable, "-m", "nemobuild", "build", "tiny.yaml"], env=environment, stderr=subprocess.PIPE
        )
        wait_for(lambda: pid.exists() and pid.read_text())
        ours.send_signal(number)
        said = ours.communicate(timeout=120)[1]
        assert ours.returncode == status and b"Traceback" not in said, said
        assert number == signal.SIGKILL or b"run the same command again (for tiny.yaml)" in said, said
        os.kill(int(pid.read_text()), 9) if number == signal.SIGKILL else None
        assert not (here / "build" / "tiny" / "engine").exists()
    done = build("tiny.yaml")
    assert actions(done) == {"checkpoint": "keep", "engine": "make", "repository": "make"}
    assert not list((here / "build" / "tiny").glob(".*partial*"))


def test_a_conversion_that_was_killed_goes_on(here, source):
    """What is left of hours of work is gone on with; that of another conversion is of no use."""

    def stop(progress):
        raise KeyboardInterrupt

    partial = here / "build" / "tiny" / ".checkpoint.new.partial"
    for precision in ("bf16", "fp8"):
        with pytest.raises(KeyboardInterrupt):
            build("tiny.yaml", on_progress=lambda *_: stop(None))
        assert partial.exists()
        write_profile(here / "tiny.yaml", source, checkpoint__precision=precision)
        assert actions(build("tiny.yaml"))["checkpoint"] in ("make", "remake")
        assert not partial.exists()
        write_profile(here / "tiny.yaml", source, checkpoint__tensor_parallel=2, machine__count=2)


def test_a_long_download_is_not_begun_in_vain(here):
    """The known configuration of a model is enough to refuse; a dry run says what there is to do."""
    name = "super-49b-v1.5-h100-fp8"
    done = run(name, STANDIN_CARDS="NVIDIA L40S:8.9")
    assert done.returncode == 4 and "NVIDIA L40S" in done.stderr and not (here / "build").exists()
    assert list(actions(steps(name))) == ["snapshot", "checkpoint", "engine", "repository"]


def test_a_replacement_that_was_killed_halfway_is_undone(here):
    build("tiny.yaml")
    folder = here / "build" / "tiny"
    (folder / "engine").rename(folder / ".engine.old")
    assert actions(build("tiny.yaml")) == dict.fromkeys(("checkpoint", "engine", "repository"), "keep")


def test_nothing_begins_before_everything_is_checked(here, source):
    """A wrong builder is told before weights are converted."""
    for changes, environment, status, words in (
        ({}, {"STANDIN_CARDS": "NVIDIA L40S:8.9"}, 4, "NVIDIA L40S"),
        ({}, {"PATH": "/usr/bin:/bin"}, 4, "no docker program"),
        ({"build__gemm_plugin": "fp8"}, {}, 2, "gemm_plugin"),
        ({"limits__max_batch_size": 64, "build__max_num_tokens": 32}, {}, 2, "max_num_tokens"),
        ({"machine__container": "27.13"}, {}, 4, "27.13"),
        ({"machine__gpu": "h1000"}, {}, 2, "h1000"),
        ({"machine__gpu": "a100-80gb", "checkpoint__precision": "fp8"}, {}, (2, 3, 4), "8.9"),
        ({"limits__max_batchsize": 8}, {}, 2, "max_batch_size"),
        ({"machine__container": "26.02"}, {}, 4, "1.1.0"),
    ):
        write_profile(here / "tiny.yaml", source, **changes)
        done = run("tiny.yaml", **environment)
        assert done.returncode in (status if isinstance(status, tuple) else (status,)), (changes, done.stderr)
        assert words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stdout == "" and not (here / "build").exists()


def test_a_plan_that_does_not_fit_is_not_built(here, source):
    write_profile(here / "tiny.yaml", source, machine__memory_share=0.001)
    done = run("tiny.yaml", "--json")
    assert done.returncode == 3 and json.loads(done.stderr)["error"]["code"] == "does-not-fit"
    assert not (here / "build").exists()
    write_profile(here / "tiny.yaml", source, machine__memory_share=1.0, limits__min_tokens_per_second=1e9)
    with pytest.raises(DoesNotFit, match=r"^tiny does not fit\.") as caught:
        build("tiny.yaml")
    assert "missing" not in str(caught.value) and "tokens/s" in caught.value.why


def test_a_folder_of_somebody_else_is_not_replaced(here):
    (here / "build" / "tiny" / "checkpoint").mkdir(parents=True)
    (here / "build" / "tiny" / "checkpoint" / "thesis.txt").write_text("years of work")
    done = run("tiny.yaml")
    assert done.returncode == 2 and "not made by nemobuild" in done.stderr
    assert (here / "build" / "tiny" / "checkpoint" / "thesis.txt").exists()


def test_two_builds_at_once(here):
    pid = here / "machine" / "pid"
    environment = command_environment() | {"STANDIN_FAIL": "hang", "STANDIN_PID": str(pid)}
    first = subprocess.Popen(
        [sys.executable, "-m", "nemobuild", "build", "tiny.yaml"], env=environment, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: pid.exists() and pid.read_text())
    second = run("tiny.yaml")
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 130
    assert second.returncode == 2 and "Another build of tiny.yaml is at work" in second.stderr


def test_a_store_that_cannot_be_written(here, monkeypatch):
    monkeypatch.chdir("/sys")
    done = run(str(here / "tiny.yaml"))
    assert done.returncode == 2 and "Not permitted" in done.stderr and "Traceback" not in done.stderr


def test_a_dry_run_says_all_and_does_nothing(here):
    done = run("tiny.yaml", "--dry-run")
    assert done.returncode == 0 and done.stdout.count("make") == 3 and not (here / "build").exists()
    done = run("tiny.yaml", "--local", "--container")
    assert done.returncode == 2


def test_a_cpu_profile_has_no_engine(here, source):
    changes = {"runtime": "cpu", "machine": None, "build": {}, "checkpoint__precision": "fp8"}
    changes |= {"checkpoint__calibration": {"samples": 2, "tokens_per_sample": 32}}
    write_profile(here / "tiny.yaml", source, **changes)
    assert actions(build("tiny.yaml")) == {"checkpoint": "make", "repository": "make"}
    assert actions(build("tiny.yaml")) == {"checkpoint": "keep", "repository": "keep"}
    write_profile(here / "tiny.yaml", source, **changes, limits__max_batch_size=4)
    assert actions(steps("tiny.yaml")) == {"checkpoint": "keep", "repository": "remake"}
    changes["checkpoint__calibration"] = {"samples": 3, "tokens_per_sample": 32}
    write_profile(here / "tiny.yaml", source, **changes)
    assert steps("tiny.yaml")[0].why == ("calibration.samples 2 -> 3",)
    build("tiny.yaml")
    assert actions(steps("tiny.yaml"))["checkpoint"] == "keep"
    write_profile(here / "tiny.yaml", source, **changes, reasoning={"policy": "none"})
    (why,) = steps("tiny.yaml")[0].why
    assert why.startswith("calibration.prompt ")
    assert calls(here) == 0


def test_llmapi_in_bf16_needs_no_checkpoint(here, source):
    write_profile(here / "tiny.yaml", source, runtime="llmapi", checkpoint__format="hf", build={})
    assert actions(build("tiny.yaml")) == {"repository": "make"}
    assert actions(build("tiny.yaml")) == {"repository": "keep"}


def test_llmapi_on_two_cards_has_one_folder_for_both(here, source):
    two = {"machine__count": 2, "checkpoint__tensor_parallel": 2, "checkpoint__format": "hf", "build": {}}
    fp8 = {"checkpoint__precision": "fp8", "checkpoint__calibration": {"samples": 2, "tokens_per_sample": 32}}
    write_profile(here / "tiny.yaml", source, runtime="llmapi", **two, **fp8)
    assert actions(build("tiny.yaml")) == {"checkpoint": "make", "repository": "make"}
    assert actions(build("tiny.yaml")) == {"checkpoint": "keep", "repository": "keep"}


def test_the_commands_are_those_that_run(here):
    lines = commands(load_plan("tiny.yaml"))
    build("tiny.yaml")
    ran = json.loads((here / "machine" / "calls").read_text().splitlines()[0])
    printed = dict(lines)["or where trtllm-build is installed"]
    assert [word.replace("/.engine.partial", "/engine") for word in ran[1:]] == printed[1:]
    docker = dict(lines)["build it in the container"]
    assert docker[-len(printed) :] == printed and docker[:2] == ["docker", "run"]
