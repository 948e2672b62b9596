"""Frozen, keyword-only configuration. The error for an unknown key suggests the nearest valid name."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from worldloom.core.errors import ConfigError
from worldloom.core.registry import Registry, nearest

_SAID = "said_by_a_component"

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base class of all configurations, which are immutable and reject unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def parse(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Build the configuration from plain values, as read from JSON.

        Raises:
            ConfigError: a key or value is wrong. The message gives the path of each wrong key or value, what was
                expected and what was found.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError("; ".join(said for _, said in explain(cls, error))) from None

    def override(self: ConfigT, assignments: Sequence[str]) -> ConfigT:
        """Return a copy with `a.b=value` assignments applied. Values that are not JSON are used as text.

        `a.name=other` replaces the component `a` by the component `other` with default options.

        Raises:
            ConfigError: an assignment has no `=`, a key is unknown, or a value has the wrong type.
        """
        values = self.model_dump(mode="json")
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(f"override {assignment!r} has no '='; expected key=value")
            _assign(values, key.strip(), parse_value(text.strip()), self)
        return type(self).parse(values)


class Component(Config):
    """Base class for the configuration of interchangeable parts; `name` selects the part."""

    name: str


C = TypeVar("C", bound=Component)


def parse_component(registry: Registry[type[C]], value: Any) -> C:
    """Return the component that `value` describes.

    `value` is a component, or a mapping with the `name` of a registered component.
    """
    if isinstance(value, Component):
        return value  # type: ignore[return-value]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ConfigError(
            f"expected a {registry.kind} with a 'name'; got {value!r}. Registered names: {', '.join(registry)}"
        )
    return registry[value["name"]].parse(value)


def component_of(registry: Registry[type[C]]) -> Callable[[Any], C]:
    """Return a validator for a field whose value is a component of the registry; errors contain key paths."""

    def parse(value: Any) -> C:
        try:
            if isinstance(value, Mapping) and isinstance(value.get("name"), str):
                return registry[value["name"]].model_validate(dict(value))
            return parse_component(registry, value)
        except ValidationError as error:
            found = explain(registry[value["name"]], error)
        except ConfigError as error:
            found = [((), str(error))]
        raise ValidationError.from_exception_data(
            registry.kind,
            [
                InitErrorDetails(
                    type=PydanticCustomError(_SAID, "{said}", {"said": said, "inside": len(place)}),
                    loc=place,
                    input=value,
                )
                for place, said in found
            ],
        )

    return parse


def parse_value(text: str) -> Any:
    """Parse `text` as JSON; return `text` unchanged if it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _assign(values: dict[str, Any], key: str, value: Any, config: Config) -> None:
    *parents, last = key.split(".")
    node: Any = values
    there: Any = config  # what `node` was written from
    for depth, part in enumerate([*parents, last]):
        path = ".".join([*parents, last][: depth + 1])
        if not isinstance(node, dict):
            raise ConfigError(
                f"unknown key {path!r}: {'.'.join(parents[:depth])!r} is a value without keys. Assign the value itself"
            )
        # The last part may be a new key, because some fields are mappings; the config class rejects it otherwise.
        if part not in node and depth < len(parents):
            raise ConfigError(f"unknown key {path!r}; {nearest(part, node)}")
        if depth == len(parents):
            if part == "name" and isinstance(there, Component) and value != node.get("name"):
                node.clear()  # a different component: the options of the previous one do not apply
            node[part] = value
        else:
            if node[part] is None and parents[depth + 1 :] == [] and last == "name":
                node[part] = {}  # a component with an automatic default
            node = node[part]
            there = there.get(part) if isinstance(there, Mapping) else getattr(there, part, None)


def explain(cls: type[BaseModel], error: ValidationError) -> list[tuple[tuple[int | str, ...], str]]:
    """Return the path of each wrong key or value, and a message with the expected and the actual value."""
    found = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == _SAID:
            outer = ".".join(str(part) for part in item["loc"][: len(item["loc"]) - item["ctx"]["inside"]])
            said = f"{outer}: {item['msg']}" if outer else item["msg"]
        elif item["type"] == "extra_forbidden":
            fields = _fields_at(cls, [str(part) for part in item["loc"][:-1]])
            said = f"unknown key {path!r}; {nearest(str(item['loc'][-1]), fields)}"
        else:
            said = f"{path or cls.__name__}: {item['msg']}; got {item.get('input')!r}"
        found.append((item["loc"], said))
    return found


def _fields_at(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = cls.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        cls = annotation
    return list(cls.model_fields)
