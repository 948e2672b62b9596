"""The rank of this process and the number of processes, from torchrun's environment variables.

Without torchrun, the rank is 0 and the number of processes is 1.
"""

import os


def is_first() -> bool:
    """Return whether this process is rank 0, which writes the files and logs."""
    return os.environ.get("RANK", "0") == "0"


def is_first_here() -> bool:
    """Return whether this process has rank 0 among the processes on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def world() -> int:
    """Return the number of processes that torchrun started on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine() -> int:
    """Return the number of processes that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
