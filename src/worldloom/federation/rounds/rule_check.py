"""A check of the components that a constitution names, before anybody signs the constitution or trains under it."""

from collections.abc import Callable

from worldloom.core.config import parse_component
from worldloom.core.errors import ConfigError
from worldloom.federation.rounds.aggregation import AGGREGATORS, Krum
from worldloom.federation.rounds.codecs import CODECS
from worldloom.federation.rounds.outer import OUTER
from worldloom.federation.rules.constitution import Constitution
from worldloom.federation.rules.partition import PartitionConfig
from worldloom.federation.secure.privacy import Accountant, PrivacyBudgetSpent


def check_rules(constitution: Constitution) -> None:
    """Check that the components of a constitution exist, have valid options, and suit the members.

    Raises:
        ConfigError: a component is invalid, no tensor can be shared, the aggregator needs more owners than there are
            members, or the privacy budget is too small for one round.
    """
    parsers: dict[str, Callable[[], object]] = {
        "aggregation": lambda: parse_component(AGGREGATORS, constitution.aggregation),
        "outer": lambda: parse_component(OUTER, constitution.outer),
        "codec": lambda: parse_component(CODECS, constitution.codec),
        "partition": lambda: PartitionConfig.parse(constitution.partition),
    }
    parsed = {}
    for key, parse in parsers.items():
        try:
            parsed[key] = parse()
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    aggregator, count = parsed["aggregation"], len(constitution.members)
    if isinstance(aggregator, Krum) and aggregator.least > count:
        raise ConfigError(
            f"aggregation: krum with bad={aggregator.bad} needs at least {aggregator.least} owners, but there are "
            f"{count} members. Lower 'bad', add members, or choose another aggregator"
        )
    if not PartitionConfig.parse(constitution.partition).shared:
        raise ConfigError("partition.shared: no tensor is shared; add a pattern, such as 'encoder.*'")
    if constitution.privacy is not None:
        try:
            Accountant(constitution.privacy).spend()
        except PrivacyBudgetSpent as error:
            raise ConfigError(f"privacy: not even one round fits into the budget: {error}") from None
