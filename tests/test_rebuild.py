"""``rebuild`` as a CI runner calls it: the real demo model from a Hub on the loopback, judged through a real Triton."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml

from nemobuild.cli.rebuild import rebuild as command
from nemobuild.demo import write_smollm2
from nemobuild.errors import IntegrityError, NemobuildError, RemoteError, UsageError, VerificationFailed
from nemobuild.gates.results import Check, Gate
from nemobuild.pipeline import Options, build, publish, stage_keys
from nemobuild.rebuild import _version, rebuild
from nemobuild.store import Store
from nemobuild.triton.client import stream
from nemobuild.triton.server import choose_endpoint, running
from nemobuild.weights.hub_client import HubClient
from nemobuild.weights.safetensors import read_header
from nemobuild.wheels import file_lock
from tests import templates
from tests.hub_server import Fault, HubServer, hub_server
from tests.tiny import write_model

pytestmark = pytest.mark.xdist_group("rebuild")

REPO = "maker/small-nemotron"
WEIGHTS = "model.safetensors"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [
    {"name": "paris", "language": "en", "ask": "What is the capital of France?", "any_of": ["Paris"]},
    {
        "name": "tokyo",
        "language": "en",
        "reasoning": "off",
        "ask": "What is the capital of Japan?",
        "any_of": ["Tokyo"],
    },
    {"name": "think", "language": "de", "reasoning": "on", "ask": "Wie viel ist 2 + 2?", "any_of": ["4"]},
]
PROFILE: dict[str, Any] = {
    "description": "The demo model from a Hub.",
    "runtime": "cpu",
    "model": {"source": REPO},
    "limits": {"max_batch_size": 4, "max_context_tokens": 128, "default_max_tokens": 24},
    "reasoning": {"policy": "nemotron-v1", "default": "off"},
    # Nothing here may depend on how busy the machine is.
    "gates": {
        "prompts": "prompts.yaml",
        "min_right": 0.6,
        "max_lost": 0,
        "tokens_per_text": 16,
        "max_slowdown": 1.0,
        "max_wait_increase": 1e9,
        "rounds": 1,
        "concurrency": 2,
        "output_tokens": 4,
    },
}


@dataclass
class Site:
    """A runner's working folder and the Hub that it asks."""

    folder: Path
    hub: HubServer
    files: dict[str, bytes]
    profile: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(PROFILE)))

    def run(self, *arguments: str, status: int = 0) -> Any:
        """The JSON that a command prints; on standard error where it fails."""
        self.write()
        done = subprocess.run(
            [sys.executable, "-m", "nemobuild", *arguments, "--json"],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr[-3000:]
        said = done.stdout if done.stdout.strip() else done.stderr
        return json.loads(said)

    def rebuild(self, *arguments: str, status: int = 0) -> Any:
        return self.run("rebuild", "small.yaml", *arguments, status=status)

    def rebuild_twice_at_once(self) -> Any:
        """What the one that came first printed; the other one says that it is at work."""
        self.write()
        command = [sys.executable, "-m", "nemobuild", "rebuild", "small.yaml", "--json"]
        both = [
            subprocess.Popen(command, cwd=self.folder, env=self.environment(), stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [process.communicate()[0] for process in both]
        found = [json.loads(text) for text in said if text]
        assert sorted(process.returncode for process in both) in ([0, 2], [0, 0])
        assert [one["status"] for one in found].count("published") == 1
        return next(one for one in found if one["status"] == "published")

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_ENDPOINT": self.hub.endpoint, "NO_PROXY": "127.0.0.1", "HF_TOKEN_PATH": str(self.folder / "none")}
        return kept | own | {"NEMOBUILD_STORE": str(self.folder / "store")}

    def write(self) -> None:
        (self.folder / "small.yaml").write_text(yaml.safe_dump(self.profile))
        (self.folder / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))

    def store(self) -> Store:
        return Store(self.folder / "store")

    def report(self) -> Any:
        return json.loads((self.folder / "build/small/report/report.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_smollm2(tmp_path_factory.mktemp("demo") / "nas", form="nas")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "source.json"}


@pytest.fixture
def site(model: dict[str, bytes], tmp_path: Path) -> Iterator[Site]:
    with hub_server() as hub:
        hub.add(REPO, model)
        yield Site(tmp_path, hub, dict(model))


def changed(files: dict[str, bytes], folder: Path, pattern: str, change: Any) -> dict[str, bytes]:
    """``files`` with ``change`` done to the weights whose names match."""
    weights, header = bytearray(files[WEIGHTS]), folder / "header.safetensors"
    header.write_bytes(files[WEIGHTS])
    for name, info in read_header(header).items():
        if re.fullmatch(pattern, name):
            values = np.frombuffer(weights, ml_dtypes.bfloat16, int(np.prod(info.shape)), info.offset).copy()
            weights[info.offset : info.offset + info.nbytes] = change(values).astype(ml_dtypes.bfloat16).tobytes()
    header.unlink()
    return files | {WEIGHTS: bytes(weights)}


def damaged(values: Any) -> Any:
    return np.random.default_rng(0).permutation(values)


def actions(site: Site) -> dict[str, str]:
    return {stage["name"]: stage["action"] for stage in site.report()["stages"]}


def says(repository: Path, log: Path) -> str:
    endpoint = choose_endpoint(ports=(0, 0, 0))
    with running(repository, endpoint, log, ready_timeout_s=120):
        return answer(endpoint.grpc_url)


def answer(url: str) -> str:
    fields = {"messages": json.dumps(QUESTION), "temperature": 0.0}
    return "".join(r.get("text_output", "") for r in stream(url, fields, timeout_s=60))


@pytest.mark.timeout(900)
def test_a_new_revision_is_published_and_a_damaged_one_is_not(site: Site, tmp_path: Path) -> None:
    first = site.rebuild_twice_at_once()
    assert (first["status"], first["publication"]) == ("published", 1)
    assert first["gates"] == {"verify": "passed", "quality": "not run", "prompts": "passed", "speed": "passed"}
    assert actions(site) == {"snapshot": "make", "checkpoint": "make", "repository": "make"}

    before = len(site.hub.requests)
    again = site.rebuild()
    assert (again["status"], again["publication"]) == ("nothing new", 1)
    assert len(site.hub.requests) == before + 1  # the commit was asked for, and nothing else

    site.hub.add(REPO, changed(site.files, tmp_path, r"model\.layers\.5\.mlp\.down_proj\.weight", lambda w: w * 1.01))
    site.hub.requests.clear()
    site.hub.faults += [Fault("/api/models/", 503), Fault("/cdn/", "cut", after=1 << 20)]
    second = site.rebuild()
    assert (second["status"], second["publication"]) == ("published", 2)
    assert set(site.hub.downloads()) == {WEIGHTS}  # the tokenizer and the rest were here
    assert actions(site) == {"snapshot": "remake", "checkpoint": "remake", "repository": "remake"}
    report = site.report()
    assert report["revisions"] == [first["revision"], second["revision"]]
    assert any(first["revision"][:12] in text and second["revision"][:12] in text for text in report["changed"])
    compared = {gate["name"]: gate for gate in report["gates"]}["quality"]
    assert abs(compared["details"]["total"]["perplexity_increase"]) < 0.05

    # A server on what is published goes on while the next revision is refused.
    published = site.store().path("repository", second["keys"]["repository"])
    endpoint = choose_endpoint(ports=(0, 0, 0))
    with running(published, endpoint, tmp_path / "served.log", ready_timeout_s=120):
        good = answer(endpoint.grpc_url)
        assert "Paris" in good
        site.hub.add(REPO, changed(site.files, tmp_path, r"model\.layers\.\d+\.mlp\.down_proj\.weight", damaged))
        refused = site.rebuild(status=7)
        assert answer(endpoint.grpc_url) == good
    assert refused["status"] == "failed" and refused["publication"] == 2
    assert refused["gates"] == {"verify": "passed", "quality": "failed", "prompts": "failed", "speed": "passed"}
    failed = site.folder / refused["failed"]
    assert {path.name for path in failed.iterdir()} == {"snapshot", "checkpoint", "repository", "report"}
    assert "Paris" not in says(failed / "repository", tmp_path / "failed.log")
    assert says(site.folder / "build/small/repository", tmp_path / "place.log") == good

    site.hub.add(REPO, site.hub.repos[REPO].commits[second["revision"]])
    assert site.rebuild()["status"] == "nothing new"  # the branch went back, and the places hold what is published

    site.profile["reasoning"]["default"] = "on"
    third = site.rebuild()
    assert (third["status"], third["publication"]) == ("published", 3)
    assert actions(site) == {"snapshot": "keep", "checkpoint": "keep", "repository": "remake"}
    assert site.report()["changed"] == ["repository: reasoning.default off -> on"]
    assert third["gates"] == {"verify": "not run", "quality": "not run", "prompts": "passed", "speed": "passed"}

    assert site.run("rollback", "small.yaml")["now"] == 2
    assert (
        site.folder.joinpath("build/small/repository/manifest.json").read_bytes()
        == (published / "manifest.json").read_bytes()
    )
    kept = site.rebuild()  # a timer does not undo a rollback
    assert (kept["status"], kept["publication"], kept["rolled_back"]) == ("nothing new", 2, 3)
    assert says(site.folder / "build/small/repository", tmp_path / "back.log") == good


# Without a model that is worth judging.


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A tiny model that was built and published, in this process; the Hub has a newer commit of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEMOBUILD_STORE", raising=False)
    monkeypatch.setattr("time.sleep", lambda s, sleep=time.sleep: sleep(min(s, 0.01)))  # the library's pauses
    profile = PROFILE | {"reasoning": {"policy": "nemotron-super-v1.5"}}
    Path("small.yaml").write_text(yaml.safe_dump(profile))
    with hub_server() as hub:
        client = HubClient
        monkeypatch.setattr(
            "nemobuild.weights.hub.HubClient", lambda repo, *_: client(repo, hub.endpoint, None, (0, 0))
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        template = templates.SUPER_V15.replace("tool_notes", "''")
        for seed in (0, 1):
            folder = write_model(tmp_path / f"source-{seed}", seed=seed, template=template)
            hub.add(REPO, {file.name: file.read_bytes() for file in folder.iterdir()})
            if seed == 0:
                build("small.yaml")
                publish("small.yaml")
        yield hub


def held() -> dict[str, str]:
    return stage_keys("small.yaml")


@pytest.mark.parametrize(
    ("path", "kind", "error", "code"),
    [
        ("/api/models/", 429, RemoteError, "rate-limited"),
        ("/api/models/", 500, RemoteError, "hub-error"),
        ("/resolve/", 429, RemoteError, "rate-limited"),
        ("/cdn/", 500, RemoteError, "hub-error"),
        ("/cdn/", "cut", RemoteError, "no-network"),
        ("/cdn/", "other-bytes", IntegrityError, "wrong-bytes"),
    ],
)
def test_what_the_hub_does_not_deliver_changes_nothing(
    tiny: HubServer, path: str, kind: int | str, error: type[NemobuildError], code: str
) -> None:
    before, current = held(), Store().current("small")
    tiny.faults.append(Fault(path, kind, times=None, after=0))
    with pytest.raises(error) as caught:
        rebuild("small.yaml")
    assert (type(caught.value), caught.value.code) == (error, code)
    assert held() == before and Store().current("small") == current
    assert not Path("build/small/report").exists()


def test_a_revision_that_cannot_be_built_leaves_the_places_as_they_were(tiny: HubServer, tmp_path: Path) -> None:
    before = held()
    files = dict(tiny.repos[REPO].commits[tiny.repos[REPO].branches["main"]])
    config = json.loads(files["config.json"]) | {"num_attention_heads": 4}
    tiny.add(REPO, files | {"config.json": json.dumps(config).encode()})
    with pytest.raises(NemobuildError):
        rebuild("small.yaml")
    assert held() == before
    assert "new" not in {path.name for path in Path("build/small").iterdir()}


def test_what_cannot_be_served_here_is_not_judged_and_does_not_stay(tiny: HubServer) -> None:
    before = held()
    Path("prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    with pytest.raises(UsageError) as caught:
        rebuild("small.yaml", Options("container"))  # the runtime cpu has none
    assert caught.value.code == "cpu-container"
    assert held() == before and len(Store().publications("small")) == 1


def test_only_one_rebuild_at_a_time(tiny: HubServer) -> None:
    with file_lock(Path("build/small/.rebuild.lock")), pytest.raises(UsageError) as caught:
        rebuild("small.yaml")
    assert caught.value.code == "busy"
    assert not tiny.downloads()[len(set(tiny.downloads())) :]  # nothing was fetched a second time


def test_what_was_published_without_gates_is_judged_once(tiny: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tiny.repos[REPO]
    repo.branches["main"] = next(iter(repo.commits))  # that of version 1
    gates: list[Gate] = [Gate("prompts", (Check("all", "bad", "", False),))]
    judged = []
    monkeypatch.setattr("nemobuild.rebuild.judge", lambda *_: (judged.append(1) or tuple(gates), {}))
    before = held()
    refused = rebuild("small.yaml")
    assert refused.status == "failed" and refused.publication == Store().current("small") and held() == before
    gates[:] = [Gate("prompts", (Check("all", "good", "", True),))]
    passed = rebuild("small.yaml")
    assert passed.status == "published" and passed.publication is not None
    assert (passed.publication.number, passed.publication.gates, dict(passed.publication.keys)) == (2, "passed", before)
    assert rebuild("small.yaml").status == "nothing new" and len(judged) == 2


def test_what_was_published_of_a_commit_can_be_named(tiny: HubServer) -> None:
    with pytest.raises(UsageError, match="'feed'") as caught:
        rebuild("small.yaml", since="feed")
    commit = str(Store().publications("small")[0].revision)
    assert commit[:12] in caught.value.why
    found = _version(Store(), "small", commit[:9])
    assert found is not None and found.number == 1


def test_a_model_that_says_nothing_sound_is_set_aside(tiny: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights: they verify, and no prompt is answered. The server of the version before is as bad."""
    before = held()
    Path("prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    found = rebuild("small.yaml")
    assert found.status == "failed" and found.failed is not None and found.publication is not None
    assert found.publication.number == 1 and held() == before
    assert {gate.name for gate in found.gates if not gate.passed} >= {"prompts"}
    assert json.loads((found.failed / "report/report.json").read_text())["verdict"].startswith("Not published: ")
    tiny.requests.clear()
    with pytest.raises(VerificationFailed) as caught:  # judged again, and made of what the store holds
        command("small.yaml")
    assert not tiny.downloads() and str(found.failed) in caught.value.next and "Version 1 stays" in caught.value.why
    stages = json.loads(Path("build/small/report/report.json").read_text())["stages"]
    assert {stage["action"] for stage in stages} == {"reuse"}
    told = capsys.readouterr()
    assert "FAILS" in told.out and "not published; version 1 stays" in told.out and "asking candidate" in told.err
