"""The processes of SuperLink and SuperNode: `flower_process.py (superlink|supernode) PARENT [OPTION ...]`.

The file is run as a script, so that it loads neither worldloom nor torch. PARENT is the id of the process that started
it; the script ends when that process ends or is killed. `flower_internals` lists the parts of Flower that it uses.
"""

import hmac
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PASS = "worldloom-pass"  # the header with the secret that all paths except those of nodes require
PASS_VARIABLE = "WORLDLOOM_PASS"
_OPEN = "/v1/fleet/"
_HEARTBEAT_SECONDS = 10  # a killed node can reconnect after two intervals; Flower's default is 30 s

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """ASGI middleware that lets only the coordinator call paths that are not for nodes.

    On the paths of nodes, Flower checks the signature of a node's key. On the same port it also serves calls that
    register nodes, start runs and send messages, without authentication; these need the coordinator's secret.
    """

    def __init__(self, app: App, secret: str) -> None:
        self._app, self._secret = app, secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or refuse it."""
        if scope["type"] == "http" and not self._allowed(scope):
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"only the coordinator may call this"})
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        shown = next((value for name, value in scope["headers"] if name == PASS.encode()), b"")
        return str(scope["path"]).startswith(_OPEN) or hmac.compare_digest(shown, self._secret)


def superlink() -> None:
    """Run Flower's SuperLink behind the gate."""
    import uvicorn
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
    from flwr.superlink.main import create_app

    secret, config = os.environ.pop(PASS_VARIABLE), _parse_superlink_lifespan_config()
    app: Any = Gate(create_app(config, SuperLinkLifespan), secret)
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        log_level="warning",
    )


def supernode() -> None:
    """Run Flower's SuperNode."""
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection
    from flwr.supernode.cli import flower_supernode

    for module in (heartbeat, fleet_http_connection):
        vars(module)["HEARTBEAT_DEFAULT_INTERVAL"] = _HEARTBEAT_SECONDS
    flower_supernode()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # so that a SuperNode deregisters and can reconnect at once
    time.sleep(5)
    os._exit(1)


if __name__ == "__main__":
    which, parent = sys.argv[1], int(sys.argv[2])
    sys.argv = [f"flower-{which}", *sys.argv[3:]]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    {"superlink": superlink, "supernode": supernode}[which]()
