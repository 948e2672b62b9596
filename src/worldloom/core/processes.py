"""Which of several processes this is, as torchrun says in the environment; outside it there is one."""

import os


def is_first() -> bool:
    """Return whether this process is the one that writes files and logs."""
    return os.environ.get("RANK", "0") == "0"


def world() -> int:
    """Return how many processes torchrun started, over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    """Return how many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
