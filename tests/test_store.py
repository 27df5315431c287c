"""The store: objects whole or not at all, publications, what ``gc`` spares, the ways in and out, signatures."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer

from nemobuild.errors import IntegrityError, RemoteError, UsageError
from nemobuild.store import Store, files, listing, signing, transfer
from tests.hub_server import TOKEN, hub_server

KEYS = {"checkpoint": "a" * 64, "repository": "b" * 64}


def artefact(folder, text="weights"):
    """A folder with a manifest, a large file by name only, one below a folder, and an empty one."""
    (folder / "model" / "1").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"key": text}))
    (folder / "rank0.safetensors").write_bytes(text.encode() * 999)
    (folder / "model" / "1" / "model.py").write_text("pass")
    (folder / "empty").touch()
    return folder


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def filled(root, *, publish=True):
    """A store with one publication of the profile ``p``; nothing outside of it is left."""
    store = Store(root)
    for stage, key in KEYS.items():
        folder = artefact(root.with_name(f"{root.name}-{stage}"), stage)
        store.commit(stage, key, folder, {"profile": "p"})
        shutil.rmtree(folder)
    if publish:
        store.publish("p", KEYS, revision="c" * 40, gates="passed", note="good")
    return store


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path / "store")


@pytest.fixture
def pems(tmp_path):
    """Paths of a private key, and of its public half."""
    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, pkcs8, plain))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    return tmp_path / "key.pem", tmp_path / "public.pem"


def command(*arguments, store=None, **more):
    environment = os.environ | ({"NEMOBUILD_STORE": str(store.root)} if store else {}) | more
    line = [sys.executable, "-m", "nemobuild", "store", *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("link_from_bytes", [0, 1 << 30])
def test_an_object_is_what_was_committed(tmp_path, monkeypatch, link_from_bytes):
    monkeypatch.setattr(files, "LINK_FROM_BYTES", link_from_bytes)
    made, store = artefact(tmp_path / "made"), Store(tmp_path / "store")
    os.utime(made / "rank0.safetensors", (1e9, 1e9))
    assert not store.has("checkpoint", KEYS["checkpoint"])
    kept = store.commit("checkpoint", KEYS["checkpoint"], made, {"profile": "p", "inputs": {"x": 1}})
    assert kept == store.path("checkpoint", KEYS["checkpoint"]) and tree(kept) == tree(made)
    store.restore("checkpoint", KEYS["checkpoint"], tmp_path / "out")
    assert tree(tmp_path / "out") == tree(made)
    stats = [(folder / "rank0.safetensors").stat() for folder in (made, kept, tmp_path / "out")]
    assert len({(s.st_ino, s.st_nlink) for s in stats}) == (1 if link_from_bytes == 0 else 3)
    assert {s.st_mtime for s in stats} == {1e9}
    record = store.record("checkpoint", KEYS["checkpoint"])
    assert record["about"] == {"profile": "p", "inputs": {"x": 1}} and record["files"].keys() == tree(made).keys()
    assert store.holds(made) == store.holds(tmp_path / "out") == ("checkpoint", KEYS["checkpoint"])
    (made / "manifest.json").write_text("{}")
    assert store.holds(made) is None and store.holds(tmp_path) is None


def test_what_is_stored_stays_as_it_is(store, tmp_path):
    before = tree(store.path("checkpoint", KEYS["checkpoint"]))
    store.commit("checkpoint", KEYS["checkpoint"], artefact(tmp_path / "other", "other"), {})
    assert tree(store.path("checkpoint", KEYS["checkpoint"])) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    store.restore("checkpoint", KEYS["checkpoint"], tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_link_is_not_stored(tmp_path):
    made = artefact(tmp_path / "made")
    (made / "secret").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="secret is not a plain file"):
        Store(tmp_path / "store").commit("engine", KEYS["checkpoint"], made, {})
    assert not Store(tmp_path / "store").has("engine", KEYS["checkpoint"])


@pytest.mark.parametrize(("stage", "key"), [("engine", "../" * 20), ("../x", "a" * 64), ("engine", "A" * 64)])
def test_a_name_cannot_leave_the_store(store, stage, key):
    for use in (store.has, store.path, store.verify):
        with pytest.raises(UsageError, match="is not the name of an object"):
            use(stage, key)
    with pytest.raises(UsageError, match="is not the name of a profile"):
        store.publish("../p", KEYS, revision=None, gates="passed", note="")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "empty").unlink(), "empty is missing"),
        (lambda f: (f / "numpy.py").touch(), "numpy.py does not belong to it"),
        (lambda f: (f / "empty").write_text("x"), "empty has another size"),
        (lambda f: (f / "model" / "1" / "model.py").write_text("quit"), "model/1/model.py has other bytes"),
    ],
)
def test_tampering_is_found_and_named(store, tmp_path, damage, words):
    damage(store.path("repository", KEYS["repository"]))
    for use in (lambda: store.verify(*list(KEYS.items())[1]), lambda: transfer.push(store, "p", str(tmp_path / "to"))):
        with pytest.raises(IntegrityError, match=words) as caught:
            use()
        assert caught.value.code == "tampered" and "store discard bbbbbbbbbbbb" in caught.value.next
    store.discard("repository", KEYS["repository"])
    with pytest.raises(IntegrityError, match="has no repository bbbbbbbbbbbb"):
        store.path("repository", KEYS["repository"])
    store.verify("checkpoint", KEYS["checkpoint"])


def test_publications_count_up_and_one_is_current(store):
    assert store.current("p") == store.publications("p")[0] and store.current("other") is None
    second = store.publish("p", {"repository": KEYS["repository"]}, revision=None, gates="not run", note="")
    assert (second.number, store.current("p")) == (2, second)
    assert store.make_current("p", 1).revision == "c" * 40 and store.current("p").number == 1
    third = store.publish("p", KEYS, revision=None, gates="failed", note="")
    assert third.number == 3 and [one.number for one in store.publications("p")] == [1, 2, 3]
    for wrong in (lambda: store.make_current("p", 9), lambda: store.make_current("other", 1)):
        with pytest.raises(UsageError, match="has no publication"):
            wrong()
    with pytest.raises(IntegrityError, match="has no engine"):
        store.publish("p", {"engine": "d" * 64}, revision=None, gates="passed", note="")
    store.make_current("p", 1)
    store.forget("p", 1)
    assert [one.number for one in store.publications("p")] == [1, 3] and store.publications("p")[-1] == third
    (store.root / "published" / "p.json").write_text('{"current": 1, "published": [{"x": 1}]}')
    with pytest.raises(IntegrityError, match="is not a list of publications"):
        store.current("p")


def test_two_publish_at_once(store):
    threads = [
        threading.Thread(
            target=store.publish, args=("p", KEYS), kwargs={"revision": None, "gates": "passed", "note": ""}
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.number for one in store.publications("p")] == list(range(1, 10))


def test_gc_spares_what_is_used(store, tmp_path):
    for number, name in enumerate(("old", "held", "new")):
        key = str(number) * 64
        folder = artefact(tmp_path / name, name)
        store.commit("engine", key, folder, {})
        os.utime(store.record_file("engine", key), (1e9 + number, 1e9 + number))
        if name != "held":
            shutil.rmtree(folder)
    users = {entry.key[0]: entry.users for entry in listing.entries(store)}
    assert users == {
        "0": (),
        "1": (str(tmp_path / "held"),),
        "2": (),
        "a": ("p version 1",),
        "b": ("p version 1",),
    }
    assert listing.collect(store, older_than_s=time.time() - 1e9 + 1e6) == []
    sizes = {entry.key[0]: entry.size_bytes for entry in listing.entries(store)}
    room = sum(sizes.values()) - 1
    assert [e.key[0] for e in listing.collect(store, max_bytes=room, dry_run=True)] == ["0"]
    assert [e.key[0] for e in listing.collect(store, max_bytes=room)] == ["0"]
    assert [e.key[0] for e in listing.collect(store)] == ["2"]
    assert [e.key[0] for e in listing.collect(store)] == []
    shutil.rmtree(tmp_path / "held")
    (store.root / "objects" / "engine" / f".{'9' * 64}.partial").mkdir()  # of a process that was killed
    assert [e.key[0] for e in listing.collect(store, older_than_s=0)] == ["1"]
    assert not list((store.root / "objects" / "engine").iterdir())
    store.verify("checkpoint", KEYS["checkpoint"])


def test_gc_leaves_what_another_process_reads(store):
    store.forget("p", 1)
    store.publish("p", {"checkpoint": KEYS["checkpoint"]}, revision=None, gates="passed", note="")
    store.forget("p", 1)
    with store.reading("repository", KEYS["repository"]):
        assert listing.collect(store) == []
    assert [entry.stage for entry in listing.collect(store)] == ["repository"]


def same(one, other):
    return all(tree(one.path(stage, key)) == tree(other.path(stage, key)) for stage, key in KEYS.items())


@pytest.mark.parametrize("address", ["{folder}/remote", "memory://remote/{name}", "file://{folder}/remote"])
def test_push_and_pull(store, tmp_path, address):
    address = address.format(folder=tmp_path, name=tmp_path.name)
    other, seen = Store(tmp_path / "other"), []
    transfer.push(store, "p", address)
    pulled = transfer.pull(other, "p", address, lambda done, total: seen.append((done, total)))
    assert (pulled.number, pulled.revision, pulled.gates, pulled.note) == (1, "c" * 40, "passed", "good")
    assert other.current("p") == pulled and same(store, other) and seen[-1][0] == seen[-1][1] > 2000
    assert other.record("checkpoint", KEYS["checkpoint"]) == store.record("checkpoint", KEYS["checkpoint"])
    seen.clear()
    assert transfer.pull(other, "p", address, lambda *done: seen.append(done)) == pulled and seen == []
    transfer.push(store, "p", address)
    assert transfer.pull(Store(tmp_path / "third"), "p", address).number == 1, "what is there is not pushed again"
    with pytest.raises(RemoteError, match="has no publication of q"):
        transfer.pull(other, "q", address)
    with pytest.raises(UsageError, match="q has no publication"):
        transfer.push(store, "q", address)


def test_a_pull_that_was_cut_goes_on(store, tmp_path, monkeypatch):
    transfer.push(store, "p", str(tmp_path / "remote"))
    other, really, fetched = Store(tmp_path / "other"), shutil.copyfile, []

    def copy(source, target):
        fetched.append(Path(source).name)
        if fetched.count("rank0.safetensors") == 1 and fetched[-1] == "rank0.safetensors":
            raise OSError(5, "Input/output error")
        return really(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(IntegrityError, match="Input/output error"):
        transfer.pull(other, "p", str(tmp_path / "remote"))
    assert other.objects() == [] and other.current("p") is None
    transfer.pull(other, "p", str(tmp_path / "remote"))
    assert same(store, other) and fetched.count("manifest.json") == 2, fetched


def test_a_remote_is_not_trusted(store, tmp_path):
    remote = tmp_path / "remote"
    transfer.push(store, "p", str(remote))
    (remote / "objects" / "checkpoint" / KEYS["checkpoint"] / "model" / "1" / "model.py").write_text("evil")
    with pytest.raises(IntegrityError, match=r"arrived changed: model/1/model.py has other bytes"):
        transfer.pull(Store(tmp_path / "other"), "p", str(remote))
    assert not any((tmp_path / "other" / name).exists() for name in ("objects", "published"))
    assert not list((tmp_path / "other" / "incoming").glob("*/*"))
    record = remote / "objects" / "checkpoint" / f"{KEYS['checkpoint']}.json"
    value = json.loads(record.read_text())
    del value["digest"]
    value["files"]["../../../../evil"] = value["files"].pop("empty")
    from nemobuild.store.objects import digest_of

    record.write_text(json.dumps({"digest": digest_of(value)} | value))
    with pytest.raises(IntegrityError, match="has no sound record of the checkpoint"):
        transfer.pull(Store(tmp_path / "other"), "p", str(remote))
    record.unlink()
    with pytest.raises(IntegrityError, match="has no sound record"):
        transfer.pull(Store(tmp_path / "other"), "p", str(remote))


def test_export_and_import(store, tmp_path):
    archive = tmp_path / "p.tar"
    done = command("export", "p", archive, store=store)
    assert done.returncode == 0 and "p version 1  exported to" in done.stdout, done.stderr
    with tarfile.open(archive) as opened:
        assert {member.name.split("/")[0] for member in opened} == {"objects", "published"}
    other = Store(tmp_path / "other")
    done = command("import", archive, store=other)
    assert done.returncode == 0, done.stderr
    assert other.current("p").number == 1 and same(store, other)
    assert not list(other.root.glob(".import-*"))
    again = command("export", "p", archive, store=store)
    assert again.returncode == 2 and "exists already" in again.stderr
    (tmp_path / "short.tar").write_bytes(archive.read_bytes()[:4000])
    for file in (tmp_path / "short.tar", tmp_path / "absent.tar"):
        done = command("import", file, store=Store(tmp_path / "third"))
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert Store(tmp_path / "third").objects() == []


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "objects/../../evil", "objects/link", "other/x"])
def test_an_archive_cannot_write_outside(tmp_path, name):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        member = tarfile.TarInfo(name)
        if name.endswith("link"):
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    with pytest.raises(UsageError, match="which is not of a store"):
        transfer.import_(Store(tmp_path / "store"), tmp_path / "bad.tar")
    assert not (tmp_path / "evil").exists()


def test_push_and_pull_through_the_hub(store, tmp_path):
    """By the real library, over HTTP: all files of an object are one commit."""
    with hub_server() as hub:
        hub.add("org/models", {".gitattributes": b"\n"})
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        done = command("push", "p", "hf://org/models/eu", store=store, **environment)
        assert done.returncode == 0, done.stderr
        repo = hub.repos["org/models"]
        assert len(repo.commits) == 1 + 2 * 2 + 1
        assert f"eu/objects/checkpoint/{KEYS['checkpoint']}.json" in repo.commits[repo.branches["main"]]
        other = Store(tmp_path / "other")
        done = command("pull", "p", "hf://org/models/eu", store=other, **environment)
        assert done.returncode == 0 and same(store, other), done.stderr
        done = command("push", "p", "hf://org/models/eu", "--json", store=store, **environment | {"HF_TOKEN": ""})
        assert done.returncode == 6 and json.loads(done.stderr)["error"]["code"] == "remote-failed", done.stderr


def test_push_and_pull_through_s3(store, tmp_path):
    """By the real client, over HTTP, to a server of its protocol."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        environment = keys | {"FSSPEC_S3_ENDPOINT_URL": address, "NO_PROXY": "127.0.0.1"}
        done = command("push", "p", "s3://models/eu", store=store, **environment)
        assert done.returncode == 0, done.stderr
        other = Store(tmp_path / "other")
        done = command("pull", "p", "s3://models/eu", store=other, **environment)
        assert done.returncode == 0 and same(store, other), done.stderr
        done = command("pull", "p", "s3://elsewhere", store=Store(tmp_path / "third"), **environment)
        assert done.returncode == 6 and "has no publication of p" in done.stderr, done.stderr
    finally:
        server.stop()
    done = command("pull", "p", "s3://models/eu", store=other, **environment)
    assert done.returncode == 6 and "Traceback" not in done.stderr, done.stderr


def test_signatures(store, tmp_path, pems):
    private, public = pems
    done = command("sign", "p", "--key", private, store=store)
    assert done.returncode == 0 and done.stdout.count("signed") == 2, done.stderr
    done = command("verify", "p", "--key", public, store=store)
    assert done.returncode == 0 and done.stdout.count("whole, and the signature holds") == 2, done.stderr
    transfer.push(store, "p", str(tmp_path / "remote"))
    other = Store(tmp_path / "other")
    transfer.pull(other, "p", str(tmp_path / "remote"))
    for stage, key in KEYS.items():
        signing.verify(other, stage, key, public)
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "stranger.pem").write_bytes(stranger.public_bytes(serialization.Encoding.PEM, form))
    done = command("verify", "p", "--key", tmp_path / "stranger.pem", store=other)
    assert done.returncode == 5 and "does not hold" in done.stderr and "Traceback" not in done.stderr, done.stderr
    file = other.path("checkpoint", KEYS["checkpoint"]) / "rank0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="The signature of the checkpoint"):
        signing.verify(other, "checkpoint", KEYS["checkpoint"], public)
    with pytest.raises(IntegrityError, match="has other bytes"):
        signing.sign(other, "checkpoint", KEYS["checkpoint"], private)
    with pytest.raises(UsageError, match="could not sign"):
        signing.sign(other, "repository", KEYS["repository"], public)
    with pytest.raises(IntegrityError, match="is not signed"):
        signing.verify(filled(tmp_path / "fresh"), "checkpoint", KEYS["checkpoint"], public)


def test_the_signature_is_that_of_the_library_alone(store, pems):
    """Whoever has no nemobuild checks it with the library's own command."""
    private, public = pems
    signature = signing.sign(store, "repository", KEYS["repository"], private)
    folder = store.path("repository", KEYS["repository"])
    line = [sys.executable, "-m", "model_signing", "verify", "key", str(folder), "--signature", str(signature)]
    done = subprocess.run([*line, "--public_key", str(public)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands(store, tmp_path):
    done = command("ls", store=store)
    assert done.returncode == 0 and "p version 1" in done.stdout and "current" in done.stdout, done.stderr
    value = json.loads(command("ls", "--json", store=store).stdout)
    assert {entry["key"] for entry in value["objects"]} == set(KEYS.values()) and value["current"] == {"p": 1}
    done = command("show", "p", store=store)
    assert "profile: p" in done.stdout and KEYS["checkpoint"] in done.stdout
    assert command("show", "aaaaaa", "--json", store=store).stdout.count('"stage": "checkpoint"') == 1
    assert command("verify", "p", store=store).stdout.count("whole") == 2
    for wrong in (["show", "zz"], ["gc", "--older-than", "soon"], ["gc", "--max-size", "5"], ["discard", "p"]):
        done = command(*wrong, store=store)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == "", done.stderr
    store.publish("p", {"repository": KEYS["repository"]}, revision=None, gates="passed", note="")
    assert "removed  0" in command("gc", store=store).stdout
    assert "would be removed  1" in command("gc", "--keep", "1", "--dry-run", store=store).stdout
    done = command("gc", "--keep", "1", "--older-than", "0s", "--json", store=store)
    assert [entry["stage"] for entry in json.loads(done.stdout)] == ["checkpoint"], done.stderr
    assert command("ls", store=Store(tmp_path / "empty")).stdout == "nothing is stored\n"
