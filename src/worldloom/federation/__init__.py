"""Federation (Tapestry): many owners weave one shared world model, and keep what is theirs.

The core knows no transport: a coordinator talks to nodes through a `Transport`, and `InProcess` is one.
"""

from worldloom.federation.aggregation import AGGREGATORS, Aggregate, Aggregator, capped
from worldloom.federation.cards import DataCard, card_of, derive, guarded_frames, may_shape_base, strictest
from worldloom.federation.codecs import CODECS, Codec, bytes_of
from worldloom.federation.constitution import Constitution, Member, Quality, Release, ratify, read_constitution
from worldloom.federation.contribution import Contribution
from worldloom.federation.coordinator import Coordinator, Rounds, read_base, recompute, save_base, succeed
from worldloom.federation.keeping import Keeping
from worldloom.federation.ledger import (
    Ledger,
    LedgerVerdict,
    Records,
    countersign,
    model_card,
    read_countersigned,
    save_countersigned,
    verify_ledger,
)
from worldloom.federation.local import LocalTraining, Trained, check_has_a_pilot, initial_base
from worldloom.federation.node import Node
from worldloom.federation.outer import OUTER, Outer
from worldloom.federation.partition import Partition, PartitionConfig, fingerprint
from worldloom.federation.privacy import Accountant, PrivacyBudgetSpent, PrivacyConfig, clip_and_noise
from worldloom.federation.release import release
from worldloom.federation.transport import InProcess, Reply, Transport

__all__ = [
    "AGGREGATORS",
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
    "Rounds",
    "Trained",
    "Transport",
    "bytes_of",
    "capped",
    "card_of",
    "check_has_a_pilot",
    "clip_and_noise",
    "countersign",
    "derive",
    "fingerprint",
    "guarded_frames",
    "initial_base",
    "may_shape_base",
    "model_card",
    "ratify",
    "read_base",
    "read_constitution",
    "read_countersigned",
    "recompute",
    "release",
    "save_base",
    "save_countersigned",
    "strictest",
    "succeed",
    "verify_ledger",
]
