"""Fetching a model through huggingface_hub, against a real HTTP server that speaks the Hub's routes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemobuild.errors import DoesNotFit, IntegrityError, NemobuildError, RemoteError, UsageError
from nemobuild.weights.hub import SOURCE, fetch
from nemobuild.weights.snapshot import open_snapshot
from tests.hub_server import TOKEN, Fault, HubServer, git_sha1, hub_server
from tests.tiny import write_model

REPO = "maker/tiny-nemotron"
SHARD = "model-00002-of-00002.safetensors"
UNWANTED = {
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"not named by the index",
    "model.Q4.gguf": b"GGUF",
    "tokenizer.bin": b"looks like a tokenizer, is a pickle",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "original/params.json": b"{}",
    "figure.png": b"png",
    "README.md": "# Tiny, mit Umlauten: äöü\n".encode(),
    "empty.py": b"",
    "LICENSE": b"licence text\n",
}
WANTED = {"README.md", "empty.py", "LICENSE"}


@pytest.fixture(autouse=True)
def apart_from_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NEMOBUILD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda s, sleep=time.sleep: sleep(min(s, 0.01)))  # the library's pauses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_model(tmp_path_factory.mktemp("source"), template="{{ messages }}")
    return {f.name: f.read_bytes() for f in folder.iterdir()} | UNWANTED


@pytest.fixture
def hub(model: dict[str, bytes]) -> Iterator[HubServer]:
    with hub_server() as server:
        server.add(REPO, model)
        yield server


def get(hub: HubServer, dest: Path, revision: str = "main", **more: Any) -> Path:
    return fetch(REPO, revision, dest, endpoint=hub.endpoint, pauses_s=more.pop("pauses_s", (0.01, 0.01)), **more)


def beside(dest: Path) -> list[str]:
    return sorted(f.name for f in dest.parent.iterdir() if f.name.startswith(dest.name) and f != dest)


def refused(hub: HubServer, dest: Path, kind: type[NemobuildError], code: str, **more: Any) -> NemobuildError:
    with pytest.raises(kind) as caught:
        get(hub, dest, **more)
    assert type(caught.value) is kind
    assert caught.value.code == code
    assert caught.value.next
    assert not dest.exists()
    return caught.value


def test_a_snapshot_is_complete_and_recorded(hub: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    dest = get(hub, tmp_path / "model", progress=lambda done, total: seen.append((done, total)))
    snapshot = open_snapshot(dest)
    assert len(snapshot.tensors) == len(snapshot.spec.tensor_shapes())
    expected = set(model) - set(UNWANTED) | WANTED
    assert {f.name for f in dest.iterdir()} == expected | {SOURCE}
    assert all((dest / name).read_bytes() == model[name] for name in expected)
    assert not any(f.is_symlink() for f in dest.iterdir())
    record = json.loads((dest / SOURCE).read_text())
    assert (record["repo"], record["commit"]) == (REPO, hub.repos[REPO].branches["main"])
    assert record["files"].keys() == expected
    for name, entry in record["files"].items():
        assert (entry["bytes"], entry["sha256"]) == (len(model[name]), hashlib.sha256(model[name]).hexdigest())
    assert record["files"]["config.json"]["git_sha1"] == git_sha1(model["config.json"])
    assert beside(dest) == []
    total = sum(len(model[name]) for name in expected)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    agents = {headers["user-agent"] for _, path, headers in hub.requests if "/cdn/" not in path}
    assert agents
    assert not any("torch" in agent for agent in agents)


def test_a_single_file_model_without_an_index(hub: HubServer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "source", shards=1)
    hub.add(REPO, {f.name: f.read_bytes() for f in folder.iterdir()} | {"extra.safetensors": b"x"}, branch="single")
    dest = get(hub, tmp_path / "model", "single")
    assert open_snapshot(dest).tensors
    assert not (dest / "extra.safetensors").exists()


def test_the_same_commit_again_downloads_nothing(hub: HubServer, tmp_path: Path) -> None:
    dest = get(hub, tmp_path / "model")
    commit = hub.repos[REPO].branches["main"]
    hub.requests.clear()
    assert get(hub, dest, "main") == dest
    assert hub.downloads() == []
    hub.requests.clear()
    assert get(hub, dest, commit) == dest
    assert hub.requests == []


def test_a_changed_revision_asks_for_a_new_folder(hub: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    dest = get(hub, tmp_path / "model")
    before = (dest / SOURCE).read_text()
    newer = hub.add(REPO, model | {"README.md": b"newer"})
    with pytest.raises(UsageError) as caught:
        get(hub, dest)
    assert caught.value.code == "folder-exists"
    assert newer in caught.value.what
    assert (dest / SOURCE).read_text() == before
    assert (get(hub, tmp_path / "newer") / "README.md").read_bytes() == b"newer"


def test_a_folder_with_other_things_is_left_alone(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError) as caught:
        get(hub, tmp_path / "model")
    assert caught.value.code == "folder-exists"
    assert [f.name for f in (tmp_path / "model").iterdir()] == ["diary.txt"]


def test_a_damaged_snapshot_is_noticed(hub: HubServer, tmp_path: Path) -> None:
    dest = get(hub, tmp_path / "model")
    with (dest / SHARD).open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(IntegrityError) as caught:
        get(hub, dest)
    assert caught.value.code == "snapshot-damaged"
    assert SHARD in caught.value.what


def test_a_branch_that_moves_during_the_download_cannot_mix(
    hub: HubServer, model: dict[str, bytes], tmp_path: Path
) -> None:
    commit = hub.repos[REPO].branches["main"]

    def move(done: int, total: int) -> None:
        hub.add(REPO, model | {"config.json": b"{}", "README.md": b"moved"})

    dest = get(hub, tmp_path / "model", progress=move)
    assert json.loads((dest / SOURCE).read_text())["commit"] == commit
    assert (dest / "config.json").read_bytes() == model["config.json"]


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_a_cut_connection_is_resumed_at_the_byte(
    name: str, hub: HubServer, model: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50)  # what it hands over at once, else 10 MiB
    hub.faults.append(Fault(f"/cdn/{REPO}" if name == SHARD else f"/{name}", "cut", after=100))
    dest = get(hub, tmp_path / "model")
    assert all((dest / n).read_bytes() == model[n] for n in (name, SHARD))
    assert "bytes=100-" in [headers.get("Range") for _, _, headers in hub.requests]
    assert "gzip" not in str([headers.get("Accept-Encoding") for _, path, headers in hub.requests if "resolve" in path])


def test_bytes_are_counted_once_when_a_file_takes_several_attempts(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50)
    # 100 bytes arrive, then nothing for as long as the library tries by itself (5 times).
    hub.faults += [Fault("/config.json", "cut", times=1, after=100), Fault("/config.json", "cut", times=6, after=0)]
    seen: list[tuple[int, int]] = []
    get(hub, tmp_path / "model", progress=lambda done, total: seen.append((done, total)))
    assert hub.downloads().count("config.json") == 8
    assert seen[-1][0] == seen[-1][1]


def test_a_server_that_ignores_ranges_starts_the_file_again(
    hub: HubServer, model: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults += [Fault(f"{SHARD}", "cut", after=0, times=0), Fault("/cdn/", "cut", times=None, after=100)]
    refused(hub, tmp_path / "model", RemoteError, "no-network", pauses_s=())
    hub.faults[:] = [Fault("/cdn/", "no-range", times=None)]
    seen: list[int] = []
    dest = get(hub, tmp_path / "model", progress=lambda done, total: seen.append(done))
    assert (dest / SHARD).read_bytes() == model[SHARD]
    assert seen[-1] == sum((dest / n).stat().st_size for n in json.loads((dest / SOURCE).read_text())["files"])


def test_a_network_that_stays_away_leaves_a_part_that_the_next_call_continues(
    hub: HubServer, model: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults.append(Fault(f"{SHARD}", 503, times=None))
    error = refused(hub, tmp_path / "model", RemoteError, "hub-error")
    assert SHARD in error.what
    assert "503" in error.what
    (stage,) = (f for f in tmp_path.iterdir() if f.name.startswith("model.partial-"))
    there = {f.name for f in stage.iterdir() if f.read_bytes() == model[f.name]}
    assert "model.safetensors.index.json" in there
    hub.faults.clear()
    hub.requests.clear()
    dest = get(hub, tmp_path / "model")
    wanted = set(model) - set(UNWANTED) | WANTED - {"empty.py"}  # nothing to ask for in an empty file
    assert set(hub.downloads()) == wanted - there
    assert (dest / SHARD).read_bytes() == model[SHARD]
    assert beside(dest) == []


def test_a_part_that_was_damaged_meanwhile_is_fetched_anew(
    hub: HubServer, model: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults.append(Fault(f"{SHARD}", 503, times=None))
    refused(hub, tmp_path / "model", RemoteError, "hub-error")
    hub.faults.clear()
    (stage,) = (f for f in tmp_path.iterdir() if f.name.startswith("model.partial-"))
    (stage / "config.json").write_bytes(b"x" * len(model["config.json"]))
    (stage / SHARD).write_bytes(b"y" * 500)
    (stage / "LICENSE").write_bytes(b"z" * 5000)
    (stage / "stray.txt").write_bytes(b"stray")
    (stage / "README.md").unlink()
    (stage / "README.md").symlink_to(tmp_path / "elsewhere")
    dest = get(hub, tmp_path / "model")
    assert all((dest / n).read_bytes() == model[n] for n in ("config.json", SHARD, "LICENSE"))
    assert not (dest / "stray.txt").exists()
    assert not (dest / "README.md").is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def test_a_partial_download_of_an_older_commit_is_removed(
    hub: HubServer, model: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults.append(Fault(f"{SHARD}", 503, times=None))
    refused(hub, tmp_path / "model", RemoteError, "hub-error")
    hub.faults.clear()
    hub.add(REPO, model | {"README.md": b"newer"})
    dest = get(hub, tmp_path / "model")
    assert (dest / "README.md").read_bytes() == b"newer"
    assert beside(dest) == []


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_transient_failure_is_tried_again(status: int, hub: HubServer, tmp_path: Path) -> None:
    hub.faults += [Fault("/api/models/", status, times=1), Fault("config.json", status, times=1)]
    assert (get(hub, tmp_path / "model") / SOURCE).exists()


@pytest.mark.parametrize("path", [SHARD, "config.json"])
@pytest.mark.parametrize("kind", ["other-bytes", "longer"])
def test_wrong_bytes_are_never_accepted(path: str, kind: str, hub: HubServer, tmp_path: Path) -> None:
    # Large files come from the second host under /cdn/, with the same name at the end.
    hub.faults.append(Fault("/cdn/" if path == SHARD else path, kind, times=None))
    error = refused(hub, tmp_path / "model", IntegrityError, "wrong-bytes")
    assert "model-0000" in error.what or "token" in error.what or path in error.what


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (Fault("/api/models/", 429, times=None), "rate-limited", "hf auth login"),
        (Fault("/api/models/", 500, times=None), "hub-error", "500"),
        (Fault("/api/models/", 403, times=None), "not-authorised", "hf auth login"),
        (Fault("config.json", 403, times=None), "not-authorised", "config.json"),
        (Fault("config.json", 404, times=None), "not-found", "config.json"),
        (Fault("config.json", "cut", times=None, after=0), "no-network", "config.json"),
    ],
)
def test_a_failure_of_the_hub_is_said_in_one_sentence(
    fault: Fault, code: str, says: str, hub: HubServer, tmp_path: Path
) -> None:
    hub.faults.append(Fault(fault.path, fault.kind, fault.times, fault.after))
    error = refused(hub, tmp_path / "model", RemoteError, code, pauses_s=(0.01,))
    assert says in str(error)
    assert "\n" not in str(error)
    assert error.exit_status == 6


def test_a_gated_model_needs_an_account(hub: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    hub.repos[REPO].gated = True
    assert "hf auth login" in refused(hub, tmp_path / "model", RemoteError, "gated-repo").next
    # The server of the large files refuses requests that carry the token.
    dest = get(hub, tmp_path / "model", token=TOKEN)
    assert (dest / SHARD).read_bytes() == model[SHARD]


def test_a_private_or_unknown_model_looks_the_same(hub: HubServer, tmp_path: Path) -> None:
    hub.repos[REPO].private = True
    private = refused(hub, tmp_path / "model", RemoteError, "no-repo")
    assert get(hub, tmp_path / "model", token=TOKEN)
    del hub.repos[REPO]
    assert str(refused(hub, tmp_path / "other", RemoteError, "no-repo")) == str(private)


def test_an_unknown_revision(hub: HubServer, tmp_path: Path) -> None:
    assert "'v9'" in refused(hub, tmp_path / "model", RemoteError, "no-revision", revision="v9").what


def test_no_network(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(RemoteError) as caught:
        fetch(REPO, "main", tmp_path / "model", endpoint="http://127.0.0.1:9", pauses_s=(0.01,))
    assert caught.value.code == "no-network"
    assert not (tmp_path / "model").exists()


def test_offline_mode_is_respected(tmp_path: Path) -> None:
    script = f"""
import pathlib, sys
from nemobuild.weights.hub import fetch
try:
    fetch("{REPO}", "main", pathlib.Path(sys.argv[1]), endpoint="http://127.0.0.1:9")
except Exception as error:
    print(type(error).__name__, error.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["RemoteError", "offline"]


@pytest.mark.parametrize("repo_id", ["not a name", "a/b/c", "../etc"])
def test_a_bad_name_is_refused_at_once(repo_id: str, hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        fetch(repo_id, "main", tmp_path / "model", endpoint=hub.endpoint)
    assert caught.value.code == "bad-repo-id"
    assert hub.requests == []


def test_a_repository_without_safetensors_is_refused_before_any_download(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    error = refused_plainly(hub, tmp_path / "model", "no-safetensors")
    assert "pytorch_model.bin" in error.why
    hub.add(REPO, {"README.md": b"data set"})
    refused_plainly(hub, tmp_path / "model", "not-a-model")
    assert hub.downloads() == []
    assert beside(tmp_path / "model") == []


def refused_plainly(hub: HubServer, dest: Path, code: str) -> NemobuildError:
    with pytest.raises(UsageError) as caught:
        get(hub, dest)
    assert caught.value.code == code
    assert not dest.exists()
    return caught.value


@pytest.mark.parametrize(
    ("index", "code"),
    [
        (b'{"weight_map": {"a": "model-00009.safetensors"}}', "shard-missing"),
        (b'{"weight_map": {"a": "../../etc/passwd"}}', "shard-missing"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "shard-missing"),
        (b'{"weight_map": ["a"]}', "bad-index"),
        (b"<html>", "bad-json"),
    ],
)
def test_an_index_that_cannot_be_trusted(
    index: bytes, code: str, hub: HubServer, model: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(REPO, model | {"model.safetensors.index.json": index})
    with pytest.raises(IntegrityError) as caught:
        get(hub, tmp_path / "model")
    assert caught.value.code == code
    assert set(hub.downloads()) == {"model.safetensors.index.json"}
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith("model")] == []


def test_too_small_a_disk_is_said_before_the_weights(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    error = refused(hub, tmp_path / "model", DoesNotFit, "disk-full")
    assert "1000 B are free" in error.why
    assert set(hub.downloads()) == {"model.safetensors.index.json"}


def test_a_disk_that_fills_up_during_the_download(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = Path.open

    def opened(path: Path, mode: str = "r", **more: Any) -> Any:
        return Full(real(path, mode, **more)) if mode == "r+b" else real(path, mode, **more)

    monkeypatch.setattr(Path, "open", opened)
    refused(hub, tmp_path / "model", DoesNotFit, "disk-full")


def test_killed_in_the_middle_then_continued(hub: HubServer, model: dict[str, bytes], tmp_path: Path) -> None:
    hub.faults.append(Fault("config.json", 503, times=None))  # never ends, until it is killed
    script = """
import pathlib, sys
from nemobuild.weights.hub import fetch
fetch(sys.argv[1], "main", pathlib.Path(sys.argv[2]), endpoint=sys.argv[3], pauses_s=[0.2] * 1000)
"""
    dest = tmp_path / "model"
    child = subprocess.Popen([sys.executable, "-c", script, REPO, str(dest), hub.endpoint])
    try:
        deadline = time.monotonic() + 30
        while "config.json" not in hub.downloads() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not dest.exists()
    assert len(beside(dest)) == 1
    hub.faults.clear()
    assert (get(hub, dest) / "config.json").read_bytes() == model["config.json"]
    assert beside(dest) == []


def test_two_processes_at_once_share_one_download(hub: HubServer, tmp_path: Path) -> None:
    script = """
import pathlib, sys
from nemobuild.weights.hub import fetch
print(fetch(sys.argv[1], "main", pathlib.Path(sys.argv[2]), endpoint=sys.argv[3]))
"""
    command = [sys.executable, "-c", script, REPO, str(tmp_path / "model"), hub.endpoint]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [child.communicate(timeout=60)[0].strip() for child in children] == [str(tmp_path / "model")] * 2
    assert hub.downloads().count("config.json") == 1
