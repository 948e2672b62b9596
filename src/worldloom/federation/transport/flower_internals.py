"""All internals of Flower (outside its public API `flwr.app`) that are used here; its version is therefore pinned.

Normally Flower sends its nodes the program that they run. This project sends and runs no program, so it talks to
SuperLink and SuperNode as Flower's own task processes do. The tests in `test_flower.py` detect a change: "deployment"
stands for `test_a_deployment_answers_refuses_strangers_and_survives_kills`, "killed" for
`test_a_killed_coordinator_leaves_nothing_behind_and_another_takes_its_place`, "grid" for the exchanges over a grid that
is a list, and "names" for `test_every_internal_of_flower_that_is_used_is_listed`.

| part | reason | test |
|---|---|---|
| `ControlHttpClient`, `ListNodesRequest`, `RegisterNodeRequest`, `StartRunRequest` | register the nodes' keys and begin a run; the command line needs a login and a project folder | deployment |
| `Fab`, `build_fab_from_files` | a run needs a program; the program used here only raises an error | deployment |
| `RuntimeHttpClient`, `AcquireTaskRequest`, `TaskType` | acquire a task; Flower's own processes would run the program in it | deployment |
| `PullTaskInputRequest`, `PushTaskOutputRequest`, `SubStatus`, `run_from_proto` | begin and end the coordinator's task | deployment, killed |
| `SendTaskHeartbeatRequest`, `HeartbeatSender` | keep a task alive; Flower's own function interrupts the process on failure | deployment |
| `HttpGrid` | send and receive messages; a subclass creates its client, which must send the secret of the gate | deployment |
| `RuntimeTokenHttpInterceptor`, `RuntimeVersionHttpInterceptor`, `SuperExecAuthHttpInterceptor` | authenticate the clients above | deployment |
| `TaskIdentity` | every `Message` reads the run's ids from it, and Flower sets it only in its own processes: set in `flower.py` | deployment, grid |
| `pull_task_input`, `push_message` | read a node's message and send its answer in Flower's chunks | deployment |
| `ErrorCode` | distinguish lost messages from answers | grid |
| `create_app`, `SuperLinkLifespan`, `_parse_superlink_lifespan_config` | run the SuperLink behind the gate; Flower has no hook for middleware (`flower_process.py`) | deployment |
| `flower_supernode` | run the SuperNode in a process that ends with its parent (`flower_process.py`) | deployment, killed |
| `HEARTBEAT_DEFAULT_INTERVAL` | replaced in two modules (`flower_process.py`), because no option sets it and a killed node can reconnect only after two intervals | deployment |
"""  # noqa: E501

from worldloom.core.errors import ConfigError
from worldloom.core.extras import missing_extra

try:
    from flwr.cli.build import build_fab_from_files as build_fab_from_files
    from flwr.common.constant import ErrorCode as ErrorCode
    from flwr.common.constant import SubStatus as SubStatus
    from flwr.common.serde import run_from_proto as run_from_proto
    from flwr.proto.control_pb2 import ListNodesRequest as ListNodesRequest
    from flwr.proto.control_pb2 import RegisterNodeRequest as RegisterNodeRequest
    from flwr.proto.control_pb2 import StartRunRequest as StartRunRequest
    from flwr.proto.fab_pb2 import Fab as Fab
    from flwr.proto.runtime_pb2 import AcquireTaskRequest as AcquireTaskRequest
    from flwr.proto.runtime_pb2 import PullTaskInputRequest as PullTaskInputRequest
    from flwr.proto.runtime_pb2 import PushTaskOutputRequest as PushTaskOutputRequest
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest as SendTaskHeartbeatRequest
    from flwr.supercore.constant import TaskType as TaskType
    from flwr.supercore.control import ControlHttpClient as ControlHttpClient
    from flwr.supercore.heartbeat import HeartbeatSender as HeartbeatSender
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor as RuntimeTokenHttpInterceptor
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor as RuntimeVersionHttpInterceptor
    from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor as SuperExecAuthHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient as RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity as TaskIdentity
    from flwr.superlink.grid import HttpGrid as HttpGrid
    from flwr.supernode.runtime.run_clientapp import pull_task_input as pull_task_input
    from flwr.supernode.runtime.run_clientapp import push_message as push_message
except ImportError as error:
    raise ConfigError(missing_extra("weave", error)) from error
