"""Federation (Tapestry): many owners train one shared world model, and keep their data and sovereign tensors.

A coordinator talks to nodes through a `Transport`: `InProcess`, or Flower in a deployment."""

from worldloom.federation.record.ledger import (
    Ledger,
    LedgerReader,
    LedgerVerdict,
    Records,
    compare_heads,
    model_card,
    read_ledger,
    verify_ledger,
)
from worldloom.federation.record.ledger_history import (
    LedgerHistory,
    Round,
    duration,
    loss_change,
    printable,
    read_history,
    size,
)
from worldloom.federation.record.ledger_watch import LedgerWatch
from worldloom.federation.record.statements import countersign, is_countersigned
from worldloom.federation.rounds.aggregation import AGGREGATORS, Aggregate, Aggregator, Deltas, capped
from worldloom.federation.rounds.base import Base, fingerprint
from worldloom.federation.rounds.codecs import CODECS, Codec
from worldloom.federation.rounds.contribution import Contribution
from worldloom.federation.rounds.coordinator import Coordinator, succeed
from worldloom.federation.rounds.local import LocalTraining, Trained, check_has_a_pilot, initial_base
from worldloom.federation.rounds.member_store import LedgerForked, LedgerRefused, MemberStore
from worldloom.federation.rounds.next_base import recompute
from worldloom.federation.rounds.node import Node
from worldloom.federation.rounds.outer import OUTER, Outer
from worldloom.federation.rounds.release import release
from worldloom.federation.rounds.round_store import RoundStore
from worldloom.federation.rounds.rule_check import check_model, check_rules
from worldloom.federation.rules.cards import (
    CLASSES,
    DataCard,
    DataClass,
    card_of,
    card_path,
    classify,
    derive,
    guarded_frames,
    may_shape_base,
    strictest,
)
from worldloom.federation.rules.constitution import Constitution, Member, Quality, Release, ratify, read_constitution
from worldloom.federation.rules.partition import Partition, PartitionConfig
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
    "Base",
    "Codec",
    "Constitution",
    "Contribution",
    "Coordinator",
    "DataCard",
    "DataClass",
    "Deltas",
    "Handler",
    "InProcess",
    "Ledger",
    "LedgerForked",
    "LedgerHistory",
    "LedgerReader",
    "LedgerRefused",
    "LedgerVerdict",
    "LedgerWatch",
    "LocalTraining",
    "Member",
    "MemberStore",
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
    "RoundStore",
    "Tls",
    "Trained",
    "Transport",
    "capped",
    "card_of",
    "card_path",
    "check_has_a_pilot",
    "check_model",
    "check_rules",
    "classify",
    "clip_and_noise",
    "compare_heads",
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
    "read_constitution",
    "read_history",
    "read_ledger",
    "recompute",
    "release",
    "size",
    "strictest",
    "succeed",
    "verify_ledger",
]
