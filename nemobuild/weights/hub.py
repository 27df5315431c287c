"""A model from the Hub: one pinned commit -> one folder, every byte verified, whole or not at all.

The revision becomes a commit before anything else, so a branch that moves during a long download cannot mix two
models. Only files that a conversion reads are fetched: what the index names, tokenizer, templates; never pickles.
The digest of a file (SHA-256 where the Hub keeps one, else the git blob id) is computed while its bytes arrive.
Files grow in a folder beside the target; a download that was cut goes on at the byte where it stopped, after what
is there was hashed again; the target appears by one rename, with ``source.json``, which records what it is. The
plain HTTP route is used for all files: it resumes at any byte.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event

from nemobuild.errors import DoesNotFit, IntegrityError, NemobuildError, UsageError, from_os_error
from nemobuild.model.hf_config import load_json
from nemobuild.units import format_bytes
from nemobuild.weights.hub_client import COMMIT, FILE_NAME, HubClient, Meter, Progress, RemoteFile
from nemobuild.wheels import cache_folder, file_lock

SOURCE = "source.json"
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_WANTED = (
    *(CONFIG, INDEX, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template*", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*", "README*"),
)
_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
_CONNECTIONS = 4
PAUSES_S = (1.0, 4.0, 15.0)


def fetch(
    repo_id: str,
    revision: str,
    dest: Path,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    pauses_s: Sequence[float] = PAUSES_S,
    before: Path | None = None,
) -> Path:
    """The model ``repo_id`` at ``revision`` (commit, tag or branch) in folder ``dest``, with ``source.json``.

    A ``dest`` that already holds this commit is returned without a download. ``endpoint`` and ``token`` default to
    what ``huggingface_hub`` is configured with; ``pauses_s`` are the waits between attempts after transient failures.
    What ``before``, an earlier snapshot, holds already is copied from there, and hashed as if it had arrived.
    Raises ``RemoteError`` when the Hub does not deliver, ``IntegrityError`` when it delivers other bytes than it lists,
    ``UsageError`` for a wrong name or a ``dest`` that holds something else, ``DoesNotFit`` when the disk is too small.
    """
    dest = dest.absolute()
    if COMMIT.fullmatch(revision) and _is_fetched(dest, repo_id, revision):
        return dest
    with lock_on(dest):
        hub = HubClient(repo_id, endpoint, token, pauses_s)
        commit, files = hub.listing(revision)
        if _is_fetched(dest, repo_id, commit):
            return dest
        wanted = select(files, repo_id)
        stage = dest.with_name(f"{dest.name}.partial-{commit[:12]}")
        try:
            clear_partial(dest, stage)
            stage.mkdir(parents=True, exist_ok=True)
            jobs = _jobs(hub, commit, files, wanted, stage)
            if before is not None:
                _take_over(before, jobs, stage)
            digests = _download_all(hub, commit, jobs, stage, progress)
            record = {"repo": repo_id, "commit": commit, "files": digests}
            (stage / SOURCE).write_text(json.dumps(record, indent=2) + "\n")
            stage.rename(dest)
        except OSError as error:
            raise from_os_error(error, dest, "fetching a model to") from error
    return dest


def newest_commit(repo_id: str, revision: str, *, pauses_s: Sequence[float] = PAUSES_S) -> str:
    """The commit that ``revision`` of ``repo_id`` means now; a full one is not asked for. Raises as ``fetch`` does."""
    if COMMIT.fullmatch(revision):
        return revision
    return HubClient(repo_id, None, None, pauses_s).listing(revision)[0]


def select(files: Mapping[str, RemoteFile], repo_id: str) -> list[RemoteFile]:
    """The files besides weights that a conversion reads, index first. Refuses a repository without safetensors."""
    if CONFIG not in files:
        raise UsageError("not-a-model", f"{repo_id} has no {CONFIG}, so it is not a model that can be converted.")
    if INDEX not in files and SINGLE not in files:
        pickles = sorted(n for n in files if any(fnmatchcase(n, p) for p in _NEVER))
        why = f"It offers {pickles[0]}, which is not read: such a file can hold a program." if pickles else ""
        raise UsageError("no-safetensors", f"{repo_id} has neither {INDEX} nor {SINGLE}.", why=why)
    wanted = [f for n, f in files.items() if any(fnmatchcase(n, p) for p in _WANTED)]
    wanted = [f for f in wanted if not any(fnmatchcase(f.name, p) for p in _NEVER)]
    return sorted(wanted, key=lambda f: (f.name != INDEX, f.name))


def _jobs(
    hub: HubClient, commit: str, files: Mapping[str, RemoteFile], wanted: Sequence[RemoteFile], stage: Path
) -> list[RemoteFile]:
    """All files to fetch, largest first. The index says which shards belong to the model; repositories hold others."""
    try:
        shards = sorted(set(weight_map(hub, commit, files, stage).values())) or [SINGLE]
    except IntegrityError:
        shutil.rmtree(stage)  # nothing to go on from
        raise
    return sorted([*wanted, *(files[n] for n in shards)], key=lambda f: -f.size_bytes)


def weight_map(hub: HubClient, commit: str, files: Mapping[str, RemoteFile], folder: Path) -> dict[str, str]:
    """Shard of every tensor, by the index, which is brought to ``folder``; empty where the model is a single file."""
    if INDEX not in files:
        return {}
    hub.download(commit, files[INDEX], folder / INDEX, Meter(0, None), Event())
    found = load_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise IntegrityError("bad-index", f"{INDEX} of {hub.repo_id} has no usable weight_map.")
    if absent := [n for n in sorted(set(found.values())) if n not in files or not n.endswith(".safetensors")]:
        raise IntegrityError("shard-missing", f"{INDEX} of {hub.repo_id} names {absent[0]!r}, which is not there.")
    return found


def _take_over(before: Path, jobs: Sequence[RemoteFile], stage: Path) -> None:
    """Copy what the snapshot ``before`` holds with the same digest; the download then finds it whole."""
    try:
        known = load_json(before / SOURCE)["files"]
        same = [f for f in jobs if (f.sha256 or f.git_sha1) in (known.get(f.name) or {}).values()]
    except (NemobuildError, KeyError, AttributeError):
        return  # not a snapshot of ours: all is fetched
    for file in same:
        if (before / file.name).is_file() and not (stage / file.name).exists():
            shutil.copyfile(before / file.name, stage / file.name)


def _download_all(
    hub: HubClient, commit: str, jobs: Sequence[RemoteFile], stage: Path, progress: Progress | None
) -> dict[str, dict[str, object]]:
    for entry in stage.iterdir():  # only what an earlier call left, and only as it left it
        if entry.name not in {f.name for f in jobs} or entry.is_symlink():
            entry.unlink()
    total_bytes = sum(f.size_bytes for f in jobs)
    present_bytes = sum(f.stat().st_size for f in stage.iterdir())
    free_bytes = shutil.disk_usage(stage).free
    if total_bytes - present_bytes > free_bytes:
        raise DoesNotFit(
            "disk-full",
            f"{hub.repo_id} needs {format_bytes(total_bytes - present_bytes)} more in {stage.parent}.",
            why=f"{format_bytes(free_bytes)} are free there.",
            next="Free some space or choose another folder, then run the same command again.",
        )
    meter, stop = Meter(total_bytes, progress), Event()
    pool = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="fetch")
    try:
        running = {f: pool.submit(hub.download, commit, f, stage / f.name, meter, stop) for f in jobs}
        digests = {f: future.result() for f, future in running.items()}
    finally:
        stop.set()  # after a failure or an interrupt the others end at their next chunk
        pool.shutdown(cancel_futures=True)
    return {
        f.name: {"bytes": f.size_bytes, "sha256": digests[f]} | ({"git_sha1": f.git_sha1} if f.git_sha1 else {})
        for f in sorted(jobs, key=lambda f: f.name)
    }


def lock_on(dest: Path) -> AbstractContextManager[None]:
    """Held by whoever writes to ``dest``; another process waits."""
    name = hashlib.sha256(str(dest).encode()).hexdigest()[:16]
    return file_lock(cache_folder() / "locks" / f"{name}.lock")


def is_whole(dest: Path, origin: Mapping[str, object], what: str) -> bool:
    """Whether ``dest`` holds ``what``: ``origin`` is in its ``source.json``, and files have the recorded sizes.

    Refuses a ``dest`` with other things.
    """
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    try:
        record = load_json(dest / SOURCE)
        files = {str(name): int(entry["bytes"]) for name, entry in record.pop("files").items()}
    except (NemobuildError, KeyError, TypeError, ValueError, AttributeError):
        record, files = {}, {}
    if record != origin:
        found = f"{record['repo']} at {record['commit']}" if {"repo", "commit"} <= record.keys() else "something else"
        raise UsageError("folder-exists", f"{dest} exists and holds {found}, not {what}.", next="Choose a new folder.")
    for name, size_bytes in files.items():
        file = dest / name
        if not FILE_NAME.fullmatch(name) or not file.is_file() or file.stat().st_size != size_bytes:
            raise IntegrityError(
                "snapshot-damaged",
                f"{file} is not as it was fetched.",
                next=f"Remove {dest} and run the same command again.",
            )
    return True


def clear_partial(dest: Path, keep: Path) -> None:
    """Remove what downloads of something else than ``keep`` left beside ``dest``. Needs the lock on ``dest``."""
    for other in dest.parent.glob(f"{glob.escape(dest.name)}.partial-*"):
        if other != keep:
            shutil.rmtree(other)


def _is_fetched(dest: Path, repo_id: str, commit: str) -> bool:
    return is_whole(dest, {"repo": repo_id, "commit": commit}, f"{repo_id} at {commit}")
