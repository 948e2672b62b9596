"""What runs in the processes of SuperLink and SuperNode: `flower_process.py (superlink|supernode) PARENT [OPTION ...]`.

It is run as a file, not imported: nothing of worldloom, and no torch, is loaded there. PARENT is the process that
started it, with which it ends, however that one ends.
"""

import hmac
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

PASS = "worldloom-pass"  # the header that opens all but what nodes use
PASS_VARIABLE = "WORLDLOOM_PASS"
_OPEN = "/v1/fleet/"
_HEARTBEAT_SECONDS = 10  # a node that was killed may come back after two of them; Flower's own 30 s keep it out longer

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """Lets everyone to what nodes use, where each call is signed by a node's key, and only the coordinator to the rest.

    Flower serves on the same port what registers nodes, starts runs and asks nodes, to whoever reaches it.
    """

    def __init__(self, app: App, secret: str) -> None:
        self._app, self._secret = app, secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and not self._may(scope):
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"only the coordinator may ask for this"})
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        shown = next((value for name, value in scope["headers"] if name == PASS.encode()), b"")
        return str(scope["path"]).startswith(_OPEN) or hmac.compare_digest(shown, self._secret)


def superlink() -> None:
    """Run Flower's SuperLink behind the gate."""
    from flwr.superlink import main
    from flwr.superlink.cli import flower_superlink

    secret, create = os.environ.pop(PASS_VARIABLE), main.create_app

    def gated(*args: Any, **kwargs: Any) -> Any:
        return Gate(create(*args, **kwargs), secret)

    vars(main)["create_app"] = gated
    flower_superlink()


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
    os.kill(os.getpid(), signal.SIGTERM)  # a SuperNode that takes its leave may come back at once
    time.sleep(5)
    os._exit(1)


if __name__ == "__main__":
    which, parent = sys.argv[1], int(sys.argv[2])
    sys.argv = [f"flower-{which}", *sys.argv[3:]]
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    {"superlink": superlink, "supernode": supernode}[which]()
