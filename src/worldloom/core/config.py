"""Frozen, keyword-only configuration. The error for an unknown key suggests the nearest valid name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from worldloom.core.errors import ConfigError, StorageError, WorldloomError
from worldloom.core.json_text import parse_json
from worldloom.core.registry import Registry, nearest

_SAID = "said_by_a_component"
_LARGEST_WHOLE = 2**63 - 1
_SHOWN = 200  # characters of a wrong value in a message

ConfigT = TypeVar("ConfigT", bound="Config")
T = TypeVar("T")

# Bounds far above any model that fits into a machine, so that the number of parameters can be computed.
Size = Annotated[int, Field(ge=1, le=65_536)]
"""One side of a layer, of a window or of a picture."""
Depth = Annotated[int, Field(ge=1, le=1024)]
"""A number of layers."""
Sizes = Annotated[tuple[Size, ...], Field(max_length=64)]
"""The sizes of consecutive layers."""


class Config(BaseModel):
    """Base class of all configurations, which are immutable and reject unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _plain_numbers(cls: type[ConfigT], values: Any, handler: Callable[[Any], ConfigT]) -> ConfigT:
        """Refuse `true` and `false` as numbers, which pydantic reads as 1 and 0, and whole numbers beyond 64 bits."""
        made = handler(values)
        given = values if isinstance(values, Mapping) else {}
        wrong = [each for name in given for each in _misread(given[name], getattr(made, name, None), (name,))]
        if wrong:
            raise ValidationError.from_exception_data(
                cls.__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError("misread", "{said}", {"said": said}), loc=place, input=value
                    )
                    for place, said, value in wrong
                ],
            )
        return made

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
        return parse_json(text)
    except ValueError:
        return text


class Shape(BaseModel):
    """The keys, with types, that the code needs from a file (not a tensor shape). Other keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


def check_shape(values: Any, shape: type[T], source: object, error: type[WorldloomError] = StorageError) -> T:
    """Return the values of a file as a `Shape`, or as another type that pydantic can check.

    Raises:
        StorageError, or the type `error`: a value is missing or has the wrong type; the message gives its path.
    """
    try:
        checked: T = TypeAdapter(shape).validate_python(values)
    except ValidationError as wrong:
        said = "; ".join(what for _, what in explain(BaseModel, wrong)[:3])
        raise error(f"{source} is damaged: {said}. Restore the file from a copy") from None
    return checked


def _misread(given: Any, made: Any, place: tuple[int | str, ...]) -> Iterator[tuple[tuple[int | str, ...], str, Any]]:
    """Yield place, mistake and given value of each number in `made` that was given as a boolean or exceeds 64 bits."""
    if isinstance(made, int | float) and not isinstance(made, bool):
        if isinstance(given, bool):
            yield place, "expected a number; write a number, or remove the key", given
        elif isinstance(made, int) and abs(made) > _LARGEST_WHOLE:
            yield place, f"expected a whole number of at most {_LARGEST_WHOLE}", given
    elif isinstance(given, Mapping) and isinstance(made, Mapping):
        for key, part in given.items():
            if key in made:
                yield from _misread(part, made[key], (*place, key))
    elif isinstance(given, list | tuple) and isinstance(made, list | tuple) and len(given) == len(made):
        for index, (part, other) in enumerate(zip(given, made, strict=True)):
            yield from _misread(part, other, (*place, index))


def _assign(values: dict[str, Any], key: str, value: Any, config: Config) -> None:
    *parents, last = key.split(".")
    node: Any = values
    there: Any = config  # the configuration whose values `node` contains
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
            said = f"{path or cls.__name__}: {item['msg']}"
            if item["type"] != "missing":
                said += f"; got {_short(item.get('input'))}"
        found.append((item["loc"], said))
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _fields_at(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = cls.model_fields.get(part)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        cls = annotation
    return list(cls.model_fields)
