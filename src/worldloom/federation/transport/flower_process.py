"""The processes of SuperLink and SuperNode: `flower_process.py (superlink|supernode) PARENT [OPTION ...]`.

It is run as a file, so that it loads neither worldloom nor torch. PARENT is the process that started it; it ends with
that process, even if that is killed. See `flower_internals` for what it uses of Flower.
"""

import hmac
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PASS = "worldloom-pass"  # the header that opens all paths but those of nodes
PASS_VARIABLE = "WORLDLOOM_PASS"
_OPEN = "/v1/fleet/"
_HEARTBEAT_SECONDS = 10  # a killed node may return after two of them; Flower's default is 30 s

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """Opens the paths of nodes, where each call is signed by a node's key, to all, and the rest to the coordinator.

    Flower serves the calls that register nodes, start runs and send messages on the same port, without authentication.
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
    os.kill(os.getpid(), signal.SIGTERM)  # so that a SuperNode deregisters, and may return at once
    time.sleep(5)
    os._exit(1)


if __name__ == "__main__":
    which, parent = sys.argv[1], int(sys.argv[2])
    sys.argv = [f"flower-{which}", *sys.argv[3:]]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    {"superlink": superlink, "supernode": supernode}[which]()
