"""Federation (Tapestry): many owners weave one shared world model, and keep what is theirs.

The core knows no transport: a coordinator talks to nodes through a `Transport`, and `InProcess` is one."""

from worldloom.federation.record.ledger import (
    Ledger,
    LedgerVerdict,
    Records,
    countersign,
    is_countersigned,
    model_card,
    read_countersigned,
    save_countersigned,
    verify_ledger,
)
from worldloom.federation.record.story import Round, Story, Watch, duration, loss_change, printable, size, tell
from worldloom.federation.rounds.aggregation import AGGREGATORS, Aggregate, Aggregator, capped
from worldloom.federation.rounds.codecs import CODECS, Codec, bytes_of
from worldloom.federation.rounds.contribution import Contribution
from worldloom.federation.rounds.coordinator import Coordinator, Rounds, read_base, recompute, save_base, succeed
from worldloom.federation.rounds.keeping import Keeping
from worldloom.federation.rounds.local import LocalTraining, Trained, check_has_a_pilot, initial_base
from worldloom.federation.rounds.node import Node
from worldloom.federation.rounds.outer import OUTER, Outer
from worldloom.federation.rounds.release import release
from worldloom.federation.rules.cards import (
    CLASSES,
    DataCard,
    DataClass,
    card_of,
    card_path,
    derive,
    guarded_frames,
    may_shape_base,
    strictest,
)
from worldloom.federation.rules.constitution import Constitution, Member, Quality, Release, ratify, read_constitution
from worldloom.federation.rules.partition import Partition, PartitionConfig, fingerprint
from worldloom.federation.secure.privacy import Accountant, PrivacyBudgetSpent, PrivacyConfig, clip_and_noise
from worldloom.federation.transport.keys import Tls, make_node_keys, make_tls
from worldloom.federation.transport.messages import Handler, InProcess, Reply, Transport

__all__ = [
    "AGGREGATORS",
    "CLASSES",
    "CODECS",
    "OUTER",
    "Accountant",
    "Aggregate",
    "Aggregator",
    "Codec",
    "Constitution",
    "Contribution",
    "Coordinator",
    "DataCard",
    "DataClass",
    "Handler",
    "InProcess",
    "Keeping",
    "Ledger",
    "LedgerVerdict",
    "LocalTraining",
    "Member",
    "Node",
    "Outer",
    "Partition",
    "PartitionConfig",
    "PrivacyBudgetSpent",
    "PrivacyConfig",
    "Quality",
    "Records",
    "Release",
    "Reply",
    "Round",
    "Rounds",
    "Story",
    "Tls",
    "Trained",
    "Transport",
    "Watch",
    "bytes_of",
    "capped",
    "card_of",
    "card_path",
    "check_has_a_pilot",
    "clip_and_noise",
    "countersign",
    "derive",
    "duration",
    "fingerprint",
    "guarded_frames",
    "initial_base",
    "is_countersigned",
    "loss_change",
    "make_node_keys",
    "make_tls",
    "may_shape_base",
    "model_card",
    "printable",
    "ratify",
    "read_base",
    "read_constitution",
    "read_countersigned",
    "recompute",
    "release",
    "save_base",
    "save_countersigned",
    "size",
    "strictest",
    "succeed",
    "tell",
    "verify_ledger",
]
