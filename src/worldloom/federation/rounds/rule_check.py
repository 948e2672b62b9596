"""Checks of a constitution before anybody signs it or trains under it."""

import logging
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from worldloom.core.config import parse_component
from worldloom.core.errors import ConfigError, DataError
from worldloom.federation.rounds.aggregation import AGGREGATORS
from worldloom.federation.rounds.codecs import CODECS
from worldloom.federation.rounds.outer import OUTER
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import PartitionConfig
from worldloom.federation.secure.privacy import Accountant, PrivacyBudgetSpent
from worldloom.federation.transport.keys import connection_key

_log = logging.getLogger(__name__)


def check_rules(constitution: Constitution) -> None:
    """Check that the components of a constitution exist, have valid options, and suit the members.

    Rules that work, but surely not as intended, are logged as warnings: a privacy budget that is too small for all
    rounds, and release conditions that no base can meet.

    Raises:
        ConfigError: a component or a member's key for connections is invalid, no tensor can be shared, the aggregator
            cannot work with so few owners, or the privacy budget is too small for one round.
    """
    _check_connections(constitution)
    parsers: dict[str, Callable[[], object]] = {
        "outer": lambda: parse_component(OUTER, constitution.outer),
        "codec": lambda: parse_component(CODECS, constitution.codec),
        "partition": lambda: PartitionConfig.parse(constitution.partition),
        "aggregation": lambda: _check_aggregation(constitution),
    }
    for key, parse in parsers.items():
        try:
            parse()
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    partition = PartitionConfig.parse(constitution.partition)
    if not [name for name in partition.shared if not any(fnmatchcase(name, one) for one in partition.sovereign)]:
        raise ConfigError(
            "partition.shared: no tensor is shared; add a pattern, such as 'encoder.*', that partition.sovereign does "
            "not cover"
        )
    if constitution.privacy is not None:
        try:
            Accountant(constitution.privacy).spend()
        except PrivacyBudgetSpent as error:
            raise ConfigError(f"privacy: not even one round fits into the budget: {error}") from None
        try:
            Accountant(constitution.privacy).spend(rounds=constitution.rounds)
        except PrivacyBudgetSpent as error:
            _log.warning("privacy: no member can contribute to all %d rounds: %s", constitution.rounds, error)
    if constitution.release.rounds > constitution.rounds:
        _log.warning(
            "release.rounds: %d is above the %d rounds, so no base can be released",
            constitution.release.rounds,
            constitution.rounds,
        )
    if constitution.release.max_loss is not None and constitution.release.max_loss <= 0:
        _log.warning("release.max_loss: no loss is 0 or less, so no base can be released")


def check_model(constitution: Constitution, base: Mapping[str, Tensor]) -> None:
    """Check that rounds can run with a base; only the shapes of its tensors are used.

    Raises:
        ConfigError: no tensor is shared, or the constitution allows only messages that are smaller than the base or
            than a masked delta.
    """
    if not base:
        raise ConfigError(
            "partition.shared: no tensor of the model is shared; add a pattern that matches one, such as 'encoder.*', "
            "or remove patterns from partition.sovereign"
        )
    values = sum(tensor.numel() for tensor in base.values())
    size = values * (8 if constitution.secure_aggregation else 4)  # masked values are integers of 64 bits
    if size > constitution.largest_bytes:
        raise ConfigError(
            f"largest_megabytes: {constitution.largest_megabytes:g} is too small for this model, whose messages have "
            f"{1e-6 * size:.3g} MB; raise it to at least {1 + math.ceil(1e-5 * values)}, and ask all members to sign "
            f"again"
        )


def _check_connections(constitution: Constitution) -> None:
    owners: dict[bytes, str] = {}
    for name, member in constitution.members.items():
        if not member.connection:  # as in a simulation
            continue
        try:
            key = connection_key(name, member.connection)
        except DataError as error:
            raise ConfigError(f"members.{name}.connection: {error}") from None
        if owners.setdefault(key, name) != name:
            raise ConfigError(
                f"members.{name}.connection: {owners[key]} has the same public key; give each node its own"
            )


def _check_aggregation(constitution: Constitution) -> None:
    aggregator = parse_component(AGGREGATORS, constitution.aggregation)
    if why := aggregator.fault(constitution.quorum, len(constitution.members), constitution.cap):
        raise ConfigError(why)
