"""Talk to the Hub through ``huggingface_hub``: list a commit, bring one file, and say what went wrong.

The library's own download function starts a cut file again from zero and writes a cache of links; its transfer
function, used here, takes any open file and a byte to go on from. Failures come from three layers (the library, its
HTTP library, which differs between its versions, and the system) and are mapped in one place, by two tables.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import Any

from nemobuild.errors import IntegrityError, NemobuildError, RemoteError, ToolchainError, UsageError, from_os_error

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from several threads, one at a time."""

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,250}")  # top level only, nothing hidden
COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK_BYTES = 1 << 20
_LISTING_TIMEOUT_S = 30.0
_SILENCE_TIMEOUT_S = 30.0
_TRANSIENT_STATUS = (408, 500, 502, 503, 504)
_AGAIN = "Run the same command again; it goes on where it stopped."
_LOGIN = "Run 'hf auth login' with an account that may read it, then the same command again."

# Exceptions of huggingface_hub.errors, most specific first: name, error, code, what, next.
_REFUSALS: tuple[tuple[str, type[NemobuildError], str, str, str], ...] = (
    ("HFValidationError", UsageError, "bad-repo-id", "{repo!r} is not a repository's name.", "Write it as owner/name."),
    (
        *("GatedRepoError", RemoteError, "gated-repo", "{repo} is gated, and this account has no access to it."),
        f"Accept its terms on the model's page. {_LOGIN}",
    ),
    (
        *("RevisionNotFoundError", RemoteError, "no-revision", "{repo} has no revision {revision!r}."),
        "Give a commit, tag or branch that it has.",
    ),
    (
        *("RepositoryNotFoundError", RemoteError, "no-repo", "There is no model {repo} on the Hub, or it is private."),
        f"Check the spelling. {_LOGIN}",
    ),
    (
        *("OfflineModeIsEnabled", RemoteError, "offline", "{what} cannot be fetched while HF_HUB_OFFLINE is set."),
        "Unset it, then run the same command again.",
    ),
)
# Status of a reply that is none of the above: code, what, next. None is any other status.
_STATUSES: dict[int | None, tuple[str, str, str]] = {
    401: ("not-authorised", "The Hub refused {what} (status {status}).", _LOGIN),
    403: ("not-authorised", "The Hub refused {what} (status {status}).", _LOGIN),
    404: ("not-found", "The Hub does not have {what} at {revision!r}.", "Check the name and the revision."),
    429: (
        *("rate-limited", "The Hub refused {what}: too many requests."),
        f"Wait some minutes ('hf auth login' raises the limit). {_AGAIN}",
    ),
    None: ("hub-error", "The Hub failed to deliver {what} (status {status}).", _AGAIN),
}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the Hub lists it. Exactly one of the two digests is set."""

    name: str
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


class HubClient:
    """One repository on the Hub, and how failures of talking to it become ours."""

    def __init__(
        self,
        repo_id: str,
        endpoint: str | None,
        token: str | None,
        pauses_s: Sequence[float],
        names: re.Pattern[str] = FILE_NAME,
    ) -> None:
        # Read when the library is imported: no telemetry, and no progress bars but ours.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        try:
            import huggingface_hub

            utils: Any = importlib.import_module("huggingface_hub.utils")
        except ImportError as error:
            raise ToolchainError(
                "no-huggingface-hub",
                "Fetching from the Hub needs the package huggingface_hub.",
                why=f"{error}.",
                next="Install it with: pip install 'nemobuild[hub]'",
            ) from error
        utils.disable_progress_bars()
        utils.logging.set_verbosity_error()
        self.repo_id, self.endpoint, self.pauses_s, self.names = repo_id, endpoint, pauses_s, names
        self.library = huggingface_hub
        self.api = huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="nemobuild")
        # Resuming counts bytes of the file itself, so no compression on the way.
        self.headers = utils.build_hf_headers(token=token, library_name="nemobuild") | {"Accept-Encoding": "identity"}

    def listing(self, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """Commit that ``revision`` means now, and its files that have one of ``names``."""
        for pause_s in (*self.pauses_s, None):
            try:
                info = self.api.model_info(
                    self.repo_id, revision=revision, files_metadata=True, timeout=_LISTING_TIMEOUT_S
                )
                return self._checked(info, revision)
            except NemobuildError:
                raise
            except Exception as error:  # of the transport library, which differs between versions
                if pause_s is None or not _is_transient(error):
                    raise self.refusal(error, revision) from error
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    def download(self, commit: str, file: RemoteFile, path: Path, meter: Meter, stop: Event) -> str:
        """Bring ``file`` to ``path``, going on after what is there; return its SHA-256."""
        from huggingface_hub.file_download import http_get

        url = self.library.hf_hub_url(self.repo_id, file.name, revision=commit, endpoint=self.endpoint)
        for attempt, pause_s in enumerate((*self.pauses_s, None)):
            try:
                with Sink(file, path, meter, stop) as sink:
                    http_get(
                        url,
                        sink,  # type: ignore[arg-type]
                        resume_size=sink.size_bytes,
                        headers=dict(self.headers),
                        expected_size=file.size_bytes,
                    )
                    if sink.is_right():
                        return sink.sha256.hexdigest()
                    sink.restart()
            except NemobuildError:
                raise
            except Exception as error:  # of the transport library, which differs between versions
                if pause_s is None or not _is_transient(error):
                    raise self.refusal(error, commit, file.name) from error
            else:
                # Once may be a fault of an earlier, interrupted download; twice is a fault of the other side.
                if pause_s is None or attempt:
                    raise IntegrityError(
                        "wrong-bytes",
                        f"{file.name} of {self.repo_id} arrived with other bytes than the Hub lists for {commit[:12]}.",
                        why="Its digest differs, also after a second download.",
                        next="Check the proxy or mirror in between, then run the same command again.",
                    )
            stop.wait(pause_s)
        raise AssertionError("unreachable")

    def read_range(self, commit: str, file: RemoteFile, start: int, count: int, stop: Event) -> Iterator[bytes]:
        """``count`` bytes of ``file`` from byte ``start``, in pieces; after a cut it goes on after the last whole one.

        A digest is of a whole file, so nothing proves these bytes but what the server says that they are.
        """
        done, pauses_s = 0, list(self.pauses_s)
        while done < count:
            before = done
            try:
                for piece in self._pieces(commit, file, start + done, start + count):
                    done += len(piece)
                    yield piece
            except NemobuildError:
                raise
            except Exception as error:  # of the transport library, which differs between versions
                pauses_s = list(self.pauses_s) if done > before else pauses_s
                if not pauses_s or not _is_transient(error):
                    raise self.refusal(error, commit, file.name) from error
                stop.wait(pauses_s.pop(0))

    def _pieces(self, commit: str, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        """Bytes ``start`` to ``end``, exclusive, of one answer, which must be of that range and of that length."""
        utils: Any = importlib.import_module("huggingface_hub.utils")
        url = self.library.hf_hub_url(self.repo_id, file.name, revision=commit, endpoint=self.endpoint)
        session, more = utils.get_session(), {"timeout": _SILENCE_TIMEOUT_S}
        more["headers"] = self.headers | {"Range": f"bytes={start}-{end - 1}"}
        # httpx since version 1 of the library, requests before.
        is_httpx = callable(session.stream)
        with session.stream("GET", url, **more) if is_httpx else session.get(url, stream=True, **more) as reply:
            utils.hf_raise_for_status(reply)
            said, left = reply.headers.get("Content-Range"), end - start
            if reply.status_code != 206 or said not in (f"bytes {start}-{end - 1}/{n}" for n in (file.size_bytes, "*")):
                raise RemoteError(
                    "no-ranges",
                    f"The server of {self.repo_id} did not answer with the part of {file.name} that was asked for.",
                    why=f"It answered with status {reply.status_code}, {said or 'the file from its start'}.",
                    next="Fetch from the Hub itself (HF_ENDPOINT unset), or the whole model and then cut its folder.",
                )
            for piece in reply.iter_bytes(_CHUNK_BYTES) if is_httpx else reply.iter_content(_CHUNK_BYTES):
                left -= len(piece)
                if left < 0:
                    raise IntegrityError("wrong-bytes", f"A part of {file.name} is longer than it says.", next=_AGAIN)
                yield piece
        if left:
            raise OSError(f"the answer ended {left} bytes early")

    def _checked(self, info: Any, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        commit = str(info.sha)
        files = {}
        for sibling in info.siblings or ():
            lfs, size = sibling.lfs, sibling.size
            known = RemoteFile(
                name=sibling.rfilename,
                size_bytes=lfs.size if lfs else size if isinstance(size, int) else -1,
                sha256=lfs.sha256 if lfs else None,
                git_sha1=None if lfs else sibling.blob_id,
            )
            if self.names.fullmatch(known.name):
                files[known.name] = known
            if known.size_bytes < 0 or not (known.sha256 or known.git_sha1):
                commit = ""
        if not COMMIT.fullmatch(commit):
            raise RemoteError(
                "bad-listing",
                f"The Hub's listing of {self.repo_id} at {revision!r} lacks its commit, or sizes and digests of files.",
                next="If a mirror is configured (HF_ENDPOINT), check that it speaks the Hub's interface.",
            )
        return commit, files

    def refusal(self, error: Exception, revision: str, file: str = "") -> NemobuildError:
        """The user's view of a failure of the Hub, the network or the library."""
        status, repo = _status(error), self.repo_id
        words = {"repo": repo, "revision": revision, "status": status, "what": f"{file} of {repo}" if file else repo}
        for name, kind, code, what, hint in _REFUSALS:
            if isinstance(error, getattr(self.library.errors, name)):
                return kind(code, what.format(**words), next=hint)
        if status is not None:
            code, what, hint = _STATUSES.get(status, _STATUSES[None])
            return RemoteError(code, what.format(**words), next=hint)
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        return RemoteError(
            "no-network",
            f"The connection failed while fetching {words['what']}.",
            why=f"The network says: {said}.",
            next=f"Check the network and proxy settings. {_AGAIN}",
        )


class Sink:
    """The growing file of one download. Hashes and counts what the transfer writes; what was there is hashed first."""

    def __init__(self, file: RemoteFile, path: Path, meter: Meter, stop: Event) -> None:
        self.file, self.path, self.meter, self.stop = file, path, meter, stop

    def __enter__(self) -> Sink:
        try:
            self.path.touch()
            self.handle = self.path.open("r+b")
            self._forget()
            if self.path.stat().st_size > self.file.size_bytes:
                self.handle.truncate(0)
            while chunk := self.handle.read(min(_CHUNK_BYTES, self.file.size_bytes - self.size_bytes)):
                self._count(chunk)
        except OSError as error:
            raise from_os_error(error, self.path, "reading") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.handle.close()
        if kind or not self.is_right():
            self.meter.add(-self.size_bytes)  # the next attempt counts what is there again

    def write(self, chunk: bytes) -> int:
        if self.stop.is_set():
            raise RemoteError("fetch-stopped", f"The download of {self.file.name} was stopped.", next=_AGAIN)
        if self.size_bytes + len(chunk) > self.file.size_bytes:
            self.restart()
            raise IntegrityError("wrong-bytes", f"{self.file.name} is longer than the Hub lists.", next=_AGAIN)
        try:
            self.handle.write(chunk)
        except OSError as error:
            raise from_os_error(error, self.path, "writing") from error
        self._count(chunk)
        return len(chunk)

    def tell(self) -> int:
        return self.size_bytes

    def seek(self, position: int) -> int:
        return self.handle.seek(position)

    def truncate(self) -> None:
        """The transfer starts again at byte 0 (the server ignored where to go on)."""
        self.restart()

    def restart(self) -> None:
        self.handle.seek(0)
        self.handle.truncate()
        self.meter.add(-self.size_bytes)
        self._forget()

    def is_right(self) -> bool:
        digest = self.sha256.hexdigest() == self.file.sha256 or self.git_sha1.hexdigest() == self.file.git_sha1
        return self.size_bytes == self.file.size_bytes and digest

    def _forget(self) -> None:
        self.size_bytes, self.sha256 = 0, hashlib.sha256()
        self.git_sha1 = hashlib.sha1(b"blob %d\0" % self.file.size_bytes, usedforsecurity=False)

    def _count(self, chunk: bytes) -> None:
        self.sha256.update(chunk)
        if self.file.git_sha1:
            self.git_sha1.update(chunk)
        self.size_bytes += len(chunk)
        self.meter.add(len(chunk))


class Meter:
    """Bytes done, over all threads."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self.done_bytes, self.total_bytes, self.progress, self.lock = 0, total_bytes, progress, Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done_bytes += count
            if self.progress and count:
                self.progress(self.done_bytes, self.total_bytes)


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_transient(error: Exception) -> bool:
    # Without a status it is the transport: refused, reset, timed out, or ended early. The library's own refusals to
    # try at all are ValueError (a name) and the built-in ConnectionError (offline mode).
    status = _status(error)
    return status in _TRANSIENT_STATUS if status is not None else not isinstance(error, (ValueError, ConnectionError))
