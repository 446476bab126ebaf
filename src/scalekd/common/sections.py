"""Base class and field types of recipe sections, validation that reports all errors together, and YAML output."""

from __future__ import annotations

import inspect
import reprlib
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

from .errors import UserError, nearest
from .text import shortened

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Pixels = Annotated[int, Field(gt=0, lt=2**16)]
Share = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["bilinear", "bicubic"]
CropShare = Annotated[float, Field(ge=0.1, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
AUTO = "auto"  # a value that follows from the device


def _or_auto(kind: str) -> WrapValidator:
    """Validates a union with `auto` with one message; pydantic reports one error per member. kind: the valid values."""

    def checked(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"{kind}, or auto (given {reprlib.repr(value)})") from None

    return WrapValidator(checked)


Workers = Annotated[Annotated[int, Field(ge=0, le=1024)] | Literal["auto"], _or_auto("a number from 0 to 1024")]
Switch = Annotated[bool | Literal["auto"], _or_auto("true or false")]
PRECISIONS = {"fp32": "float32", "bfloat16": "bf16", "float16": "fp16"}  # other names -> ours
_our_name = BeforeValidator(lambda name: PRECISIONS.get(name, name) if isinstance(name, str) else name)
Precision = Annotated[Literal["auto", "float32", "bf16", "fp16"], _our_name]
HalfPrecision = Annotated[Literal["bf16", "fp16"], _our_name]


def _one_message(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:  # pydantic reports one error per form; one message is enough
        raise ValueError(
            f"pixels, such as 224 or [192, 256] for height and width (given {reprlib.repr(value)})"
        ) from None


ImageSize = Annotated[Pixels | tuple[Pixels, Pixels], WrapValidator(_one_message)]
MOST_PROBLEMS = 30  # listed in one message


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) in pixels of an `image_size`, which may be one number for a square."""
    return (size, size) if isinstance(size, int) else size


class Section(BaseModel):
    """A section of a recipe: immutable, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic converts true to 1, so `epochs: yes` would train for one epoch
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in typing.get_args(annotation):
            raise PydanticCustomError("bool", "true and false are not allowed here")
        return value

    def complete(self) -> dict[str, Any]:
        """The section as plain values, including defaults."""
        return self.model_dump(mode="json")


S = TypeVar("S", bound=Section)


def validated(schema: type[S], values: dict[str, Any], where: str) -> S:
    """Builds a `schema` from plain values. Raises `UserError` that lists all problems; `where` names the recipe."""
    try:
        return schema.model_validate(values)
    except UserError as error:  # raised in a validator; pydantic does not catch it
        raise UserError(f"{where}: {error}") from None
    except ValidationError as error:
        errors = error.errors()
        lines = [line for e in errors[:MOST_PROBLEMS] for line in described(dict(e), schema)]
    count = len(lines) + max(0, len(errors) - MOST_PROBLEMS)
    listed = [f"  - {shortened(line)}" for line in lines[:MOST_PROBLEMS]]
    if count > MOST_PROBLEMS:
        listed.append(f"  - and {count - MOST_PROBLEMS} more")
    raise UserError(f"{where}: {count} problem{'s' * (count > 1)}\n" + "\n".join(listed))


def section_of(schema: type[S], values: dict[str, Any], key: str) -> S:
    """Builds a section from arguments; None stands for the default. Raises `UserError` that names `key`.FIELD."""
    try:
        return schema.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        lines = [line for e in error.errors() for line in described(dict(e), schema)]
        raise UserError("\n".join(f"{key}.{line}" for line in lines)) from None


def described(error: dict[str, Any], schema: type[Section]) -> list[str]:
    """A pydantic error in values of `schema` as lines of the form `key: problem`, with the nearest valid key."""
    path = [str(part) for part in error["loc"]]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        return [f"{where}: unknown.{nearest(path[-1], fields_at(path[:-1], schema))}"]
    if error["type"] == "missing":
        return [f"{where}: missing"]
    if error["type"] == "value_error":
        whole = where in ("", "losses")  # their messages name the key already
        return [line if whole else f"{where}: {line}" for line in str(error["ctx"]["error"]).splitlines()]
    if error["type"] == "model_type":
        return [
            f"{where}: must have keys and values, such as {where}: {{key: value}} (given {reprlib.repr(error['input'])})"
        ]
    return [f"{where}: {error['msg']} (given {reprlib.repr(error['input'])})"]


def fields_at(path: list[str], schema: type[Section]) -> list[str]:
    """The valid keys of the section at `path` below `schema`."""
    section: Any = schema
    parts = iter(path)
    for part in parts:
        annotation = section.model_fields[part].annotation
        if typing.get_origin(annotation) is dict:
            next(parts, None)  # a key of this dict, chosen by the user
        section = next(
            (a for a in (annotation, *typing.get_args(annotation)) if inspect.isclass(a) and issubclass(a, Section)),
            schema,
        )
    return list(section.model_fields)


def to_yaml(config: Section) -> str:
    """The recipe as YAML, with all defaults (also of methods) written out: it stays valid if a default changes later."""
    return yaml.safe_dump(config.complete(), sort_keys=False)
