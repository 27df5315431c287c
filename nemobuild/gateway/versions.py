"""Which Triton answers, and how that changes while clients are connected.

Whoever started the gateway steers it over a socket: a line of JSON says where new requests go, or that they are
refused for a while; the reply says how many earlier ones are still being answered somewhere else. Every request keeps
the version that it began with, to its last token. An order may be given again and again, so the same one also asks
whether the earlier requests are over.
"""

from __future__ import annotations

import asyncio
import json
import socket
from functools import cached_property
from pathlib import Path

from nemobuild.gateway import Target
from nemobuild.gateway.errors import ApiError
from nemobuild.gateway.responses import TokenBytes
from nemobuild.gateway.upstream import Upstream
from nemobuild.runtime.settings import load_settings


class Version:
    """What requests need of one target. ``in_flight`` counts those that are not over."""

    def __init__(self, target: Target) -> None:
        assets = Path(target.assets)
        self.target = target
        self.settings = load_settings(assets / "runtime.json")
        self.created = int((assets / "runtime.json").stat().st_mtime)
        self.token_bytes = _token_bytes(assets / "tokenizer.json")
        self.in_flight = 0

    @cached_property
    def upstream(self) -> Upstream:
        """Made when it is first needed, since that is inside the event loop."""
        return Upstream(self.target.grpc_url)


class Versions:
    """The current version, and earlier ones that still answer."""

    def __init__(self, target: Target, held: bool) -> None:
        self.current, self.held = Version(target), held
        self._earlier: list[Version] = []

    def enter(self) -> Version:
        """The version that answers a request which begins now; give it back to ``leave``.

        Raises ``ApiError`` while requests are refused.
        """
        if self.held:
            raise ApiError(503, "another version of the model is being started, try again", code="rolling")
        self.current.in_flight += 1
        return self.current

    def leave(self, version: Version) -> None:
        version.in_flight -= 1

    def failed(self, version: Version, error: ApiError) -> ApiError:
        """What a client is told: of a server that is being stopped, that rather than how it broke off."""
        if version is self.current and not self.held:
            return error
        return ApiError(503, "the server stopped for another version before the answer was whole", code="rolling")

    async def steer(self, target: Target, held: bool) -> int:
        """Send new requests to ``target``, or refuse them; how many others are not over.

        Raises ``OSError`` or ``ValueError``, and changes nothing, when the target's assets cannot be read.
        """
        if target != self.current.target:
            back = [version for version in self._earlier if version.target == target]
            new = back[0] if back else await asyncio.to_thread(Version, target)
            self._earlier = [version for version in (*self._earlier, self.current) if version is not new]
            self.current = new
        self.held = held
        for version in [version for version in self._earlier if not version.in_flight]:
            self._earlier.remove(version)
            await version.upstream.close()
        return sum(version.in_flight for version in (*self._earlier, *([self.current] if held else [])))

    async def follow(self, control_fd: int) -> None:
        """Obey whoever holds the other end of the socket, until it is closed."""
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=control_fd))
        while line := await reader.readline():
            order = json.loads(line)
            try:
                reply: dict[str, object] = {"left": await self.steer(Target(**order["target"]), order["held"])}
            except (OSError, ValueError) as error:
                reply = {"error": str(error)}
            writer.write(json.dumps(reply).encode() + b"\n")

    async def close(self) -> None:
        for version in (*self._earlier, self.current):
            await version.upstream.close()


def _token_bytes(tokenizer_json: Path) -> TokenBytes:
    """What each token stands for; the tokenizer is read when the first client asks for log-probabilities."""
    table: list[bytes] = []

    def token_bytes(token: int) -> bytes:
        if not table:
            from tokenizers import Tokenizer

            from nemobuild.runtime.detokenizer import Vocabulary

            vocabulary = Vocabulary(Tokenizer.from_file(str(tokenizer_json)))
            size = vocabulary.tokenizer.get_vocab_size()
            known = vocabulary.token_bytes or [vocabulary.decode([i]).encode() for i in range(size)]
            table.extend(data or (vocabulary.tokenizer.id_to_token(i) or "").encode() for i, data in enumerate(known))
        return table[token]

    return token_bytes
