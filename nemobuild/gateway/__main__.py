"""The gateway's process: ``python -m nemobuild.gateway CONFIG``, started by ``nemobuild.gateway.process``.

CONFIG is the JSON of a ``GatewayConfig``. The socket is the parent's, so that no connection is refused while a gateway
that died is started again.
"""

from __future__ import annotations

import json
import logging
import socket
import sys


def main() -> None:
    import uvicorn

    from nemobuild.gateway import GatewayConfig
    from nemobuild.gateway.app import make_app

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    config = GatewayConfig.read(json.loads(sys.argv[1]))
    server = uvicorn.Config(
        make_app(config),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(server).run(sockets=[socket.socket(fileno=config.fd)])


if __name__ == "__main__":
    main()
