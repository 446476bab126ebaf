"""Options of the losses: read from the signatures of the methods, checked and converted."""

from __future__ import annotations

import inspect
import reprlib
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from scalekd.common.errors import UserError, nearest

LossWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OF_ANY_LOSS: dict[str, Any] = {"weight": LossWeight, "teachers": list[str]}  # options that every loss has


def options_of(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword options of a method with resolved annotations. Its signature is the only source of its defaults."""
    function = method.__init__ if inspect.isclass(method) else method
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.replace(annotation=hints[p.name]) for p in parameters if p.kind is p.KEYWORD_ONLY}


def method_problems(name: str, options: Any) -> list[str]:
    """One line per problem of `losses.NAME`: unknown method or option, or a value of the wrong type."""
    from scalekd.methods.names import METHODS

    if name not in METHODS:
        return [f"losses.{name}: unknown method.{nearest(str(name), METHODS)}"]
    if not isinstance(options, dict):
        return [
            f"losses.{name}: options must be a mapping, not {reprlib.repr(options)}; write {{}} for the defaults, "
            f"or losses.{name}=off to remove the loss"
        ]
    known = _annotations(name)
    problems = [f"losses.{name}.{k}: unknown option.{nearest(str(k), known)}" for k in options if k not in known]
    for key, value in options.items():
        annotation = known.get(key, bool)
        if isinstance(value, bool) and bool not in (annotation, *typing.get_args(annotation)):
            problems.append(f"losses.{name}.{key}: cannot be true or false (given {value})")
        try:
            if key in known:
                _adapter(known[key]).validate_python(value)
        except ValidationError as error:
            problems += [f"losses.{name}.{key}: {e['msg']} (given {reprlib.repr(value)})" for e in error.errors()[:1]]
    return problems


def typed_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options` converted to the types in the method's signature, such as lists to tuples."""
    known = _annotations(name)
    return {k: _adapter(known[k]).validate_python(v) for k, v in options.items()}


def written_out(losses: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The losses as plain values with all defaults filled in. Options are in the order of the signatures."""
    return {name: _written_out(name, options) for name, options in losses.items()}


def _written_out(name: str, options: dict[str, Any]) -> dict[str, Any]:
    from scalekd.methods.names import METHODS

    values = {key: p.default for key, p in options_of(METHODS[name]).items()} | options
    known = OF_ANY_LOSS | _annotations(name)
    return {key: _adapter(a).dump_python(values[key], mode="json") for key, a in known.items() if key in values}


def apart_from_defaults(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method that differ from their defaults."""
    from scalekd.methods.names import METHODS

    defaults = _written_out(name, {}) if name in METHODS else {}
    return {key: value for key, value in options.items() if key not in defaults or value != defaults[key]}


def _annotations(name: str) -> dict[str, Any]:
    """The types of all options that a recipe can give to a method, by name."""
    from scalekd.methods.names import METHODS

    return {key: p.annotation for key, p in options_of(METHODS[name]).items()} | OF_ANY_LOSS


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def reads_teacher(loss: str) -> bool:
    """Whether a method, given by name, uses a teacher."""
    from scalekd.methods.names import METHODS

    return getattr(METHODS[loss], "needs_teacher", True)


def reads_logits(loss: str) -> bool:
    """Whether a method, given by name, uses the student's logits."""
    from scalekd.methods.names import METHODS

    method = METHODS[loss]
    return getattr(method, "needs_logits", not getattr(method, "needs_maps", True))


def reads_pooled(loss: str) -> bool:
    """Whether a method, given by name, uses the input of the student's classifier."""
    from scalekd.methods.names import METHODS

    return getattr(METHODS[loss], "needs_pooled", False)


def label_problems(losses: Mapping[str, Mapping[str, Any]], several: bool) -> list[str]:
    """One line for each loss that does not suit the labels.

    A method that needs one class per image says why in `one_label`; its option `probabilities: sigmoid` lifts that. A
    method for sets of labels only has `several_labels`.

    several: whether the images have sets of labels.
    """
    from scalekd.methods.names import METHODS

    problems = []
    for name, options in losses.items():
        reason = getattr(METHODS[name], "one_label", "")
        if several and reason and options.get("probabilities") != "sigmoid":
            problems.append(f"losses.{name}: needs one class per image, and the images have sets of labels: {reason}")
        if not several and getattr(METHODS[name], "several_labels", False):
            problems.append(
                f"losses.{name}: it is for sets of labels, and the images have one class each; use ce or bce, or name a "
                "`separator` if the table has several labels in a cell (`scalekd docs labels`)"
            )
    return problems


def explained(name: str) -> str:
    """What a method computes, and its options with their defaults. Raises `UserError` for an unknown name."""
    from scalekd.methods.names import METHODS

    if name not in METHODS:
        raise UserError(f"unknown method `{name}`.{nearest(name, METHODS)}")
    options = [
        f"  losses.{name}.{key}={parameter.default!r}  ({inspect.formatannotation(parameter.annotation)})"
        for key, parameter in options_of(METHODS[name]).items()
    ]
    common = f"  losses.{name}.weight=1.0  (a factor of the loss; every method has it)"
    return "\n".join([inspect.getdoc(METHODS[name]) or name, "", "Defaults:", *options, common])
