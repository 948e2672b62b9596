from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BeforeValidator, SerializeAsAny

from worldloom.core.config import Component, Config, parse_component, parse_value
from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry

PARTS: Registry[type[Component]] = Registry("part")


@PARTS.register("round")
class Round(Component):
    name: str = "round"
    radius: float = 1.0


@PARTS.register("square")
class Square(Component):
    name: str = "square"
    side: int = 2


class Inner(Config):
    steps: int = 10
    rate: float = 0.1


PartField = Annotated[SerializeAsAny[Component], BeforeValidator(lambda value: parse_component(PARTS, value))]


class Outer(Config):
    inner: Inner = Inner()
    part: PartField = Round()
    label: str = "x"
    spare: PartField | None = None


def test_overrides_reach_nested_values_and_leave_the_original() -> None:
    base = Outer()
    changed = base.override(["inner.steps=20", "part.radius=3", "label=7 up"])
    assert (changed.inner.steps, changed.part.radius, changed.label) == (20, 3.0, "7 up")  # type: ignore[attr-defined]
    assert base == Outer()


def test_override_can_exchange_a_component() -> None:
    changed = Outer().override(['part={"name": "square", "side": 5}'])
    assert changed.part == Square(side=5)


def test_override_can_exchange_a_component_by_name_alone_and_go_on_with_its_options() -> None:
    base = Outer().override(["part.radius=3"])
    assert base.override(["part.name=square"]).part == Square()
    assert base.override(["part.name=square", "part.side=5"]).part == Square(side=5)
    assert base.override(["part.name=round"]).part == Round(radius=3)
    assert base.override(["spare.name=square", "spare.side=5"]).spare == Square(side=5)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.stpes=20", "did you mean 'steps'"),
        ("iner.steps=20", "did you mean 'inner'"),
        ("inner.steps=many", "inner.steps"),
        ("inner.steps.more=1", "is a value without keys"),
        ("part.raduis=1", "did you mean 'radius'"),
        ('part={"name": "rond"}', "did you mean 'round'"),
        ("steps", "no '='"),
        ("inner.rate=NaN", "inner.rate"),
    ],
)
def test_a_wrong_override_says_what_is_near(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Outer().override([assignment])


def test_json_round_trip_keeps_components() -> None:
    config = Outer(part=Square(side=9))
    assert Outer.parse(config.model_dump(mode="json")) == config


def test_configs_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer().label = "y"  # type: ignore[misc]


@given(st.one_of(st.integers(), st.booleans(), st.lists(st.integers()), st.none()))
def test_values_are_read_as_json(value: Any) -> None:
    import json

    assert parse_value(json.dumps(value)) == value


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        PARTS.register("round")(Square)
