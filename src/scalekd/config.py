"""A run, described: YAML recipe + `key=value` overrides -> `Config`, with all errors told at once."""

from __future__ import annotations

import inspect
import re
import reprlib
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .config_checks import misfits
from .errors import UserError, nearest, printable, shortened
from .loss_options import method_problems, typed_options, written_out
from .recipe_files import merged, override, recipe_values

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Pixels = Annotated[int, Field(gt=0, lt=2**16)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _one_message(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:  # one for each form; people want one
        raise ValueError(
            f"pixels, such as 224 or [192, 256] for height and width (given {reprlib.repr(value)})"
        ) from None


def _natural_or_names(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            "`natural`, or the names of the data's classes in the teacher's order, those like numbers in quotes "
            f"(given {reprlib.repr(value)})"
        ) from None


ClassOrder = Annotated[Literal["natural"] | tuple[str, ...], WrapValidator(_natural_or_names)]
ImageSize = Annotated[Pixels | tuple[Pixels, Pixels], WrapValidator(_one_message)]
FIT = "fit"  # of `teacher.head`, in place of a folder
MOST_PROBLEMS = 30  # told at once


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1, so `epochs: yes` would be a run of one epoch
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("bool", "true and false are no value for it")
        return value


S = TypeVar("S", bound=Section)


class Data(Section):
    train: str | None = None
    """Where the training images are: a folder with one sub-folder per class, or a named source (docs/data.md)."""
    val: str | None = None
    """Validation images, same forms. Without it `val_fraction` of `train` is held out."""
    unlabelled: str | None = None
    """Training images without labels: a folder or a named source, whose labels are not read if it has any; or `rest`,
    what `limit` leaves out of `train` (docs/unlabelled.md)."""
    unlabelled_limit: Positive | None = None
    """Use only so many of them, chosen by `seed`."""
    unlabelled_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of every batch, beside labelled images."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    limit: Positive | None = None
    """Use only so many training images, the same number per class, chosen by `seed`."""
    seed: Seed = 0
    """Chooses the held-out images and the `limit`; apart from the run's seed so that seeds share their data."""
    image_size: ImageSize = 224
    """Pixels, square or (height, width). The student sees this size."""
    channels: Literal[1, 3] = 3
    on_bad_image: Literal["error", "skip"] = "error"
    """An image that cannot be read: stop and name it, or leave it out and list it in the run's folder."""
    max_bad: Share = 0.01
    """`on_bad_image: skip` stops when more than this share of the images is bad (docs/data.md)."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 4


class Augment(Section):
    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    scale: tuple[Share, Share] = (0.08, 1.0)
    """Area range of `crop: random_resized`."""
    pad: Annotated[int, Field(ge=0, lt=2**16)] = 4
    """Pixels of zero padding on each side for `crop: pad`, which then cuts out `image_size`."""
    flip: Share = 0.5
    color_jitter: Annotated[float, Field(ge=0, le=100)] = 0.0
    auto_augment: str | None = None
    """timm's notation, such as rand-m7-mstd0.5."""

    @field_validator("auto_augment")
    @classmethod
    def _readable(cls, policy: str | None) -> str | None:
        from timm.data import create_transform

        if policy is None:
            return None
        try:
            create_transform(32, is_training=True, auto_augment=policy)
            ignored = [part for part in policy.split("-")[1:] if not re.match(r"t|[a-z]+\d", part)]
            if ignored or not policy:
                raise ValueError(f"it would ignore `{'-'.join(ignored)}`")
        except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"timm cannot read `{printable(policy)}` ({printable(str(error) or type(error).__name__)}); "
                "write such as rand-m7-mstd0.5"
            ) from None
        return policy

    repeats: Positive = 1
    """Repeated augmentation (arXiv:1901.09335): each image so often in a batch, and that part of the images an epoch."""
    erase: Share = 0.0
    """Probability of random erasing, filled with normal noise in the student's normalised space."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: Annotated[float, Field(ge=0.1, le=1)] = 0.875
    """Validation: the image is resized to image_size / crop_pct and its centre is cut out."""


class Backbone(Section):
    model: str
    """A timm model name; or a folder, a scalekd run's or one in timm's format (docs/any-teacher.md)."""
    weights: str | None = None
    """`pretrained` (timm's own), the path of a .safetensors or .pt file, or `random` / nothing for the initial values."""
    prefix: str | None = None
    """What stands before the model's names in `weights`, such as `teacher.backbone.`; found out unless given."""
    kwargs: dict[str, JsonValue] = {}
    """Passed to `timm.create_model`."""
    image_size: ImageSize | None = None
    """Pixels that it is built for; timm's own for that model unless given."""
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Statistics of the model's input for pixels in [0, 1]; timm's own for that model unless given."""

    @field_validator("kwargs")
    @classmethod
    def _of_the_architecture(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        # timm would fetch weights from where these say, and older versions of it run code from such a file
        refused = [key for key in kwargs if key in ("checkpoint_path", "cache_dir") or key.startswith("pretrained")]
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: not here; `weights` names the weights, such as student.weights=FILE"
            )
        if odd := [key for key in kwargs if not key.isidentifier()]:
            raise ValueError(f"{printable(repr(odd[0]))} is no name of an argument")
        return kwargs

    @field_validator("model")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm

        from . import mixer  # noqa: F401 - adds a name to timm's
        from .model_folders import way_to

        if not timm.is_model(name):
            raise ValueError(f"timm has no model `{printable(name)}`{way_to(name)}")
        return name


class Model(Backbone):
    image_size: ImageSize | None = None
    """Teachers: the size the teacher sees, if not the student's; resized from the same augmented pixels."""
    cuts: tuple[int, int, int, int] | None = None
    """Plain ViTs and MLPs: the blocks after which stages 1 to 4 end. Quarters of the depth unless given."""
    top1: Annotated[float, Field(ge=0, le=100)] | None = None
    """Teachers: known top-1 accuracy in % on the validation images; pre-flight warns when a sample is far below."""
    head: str | None = None
    """Teachers: the folder of a classifier that `scalekd head` fitted on this backbone; it takes the place of any other.
    `fit`: `scalekd train` fits one first, on the run's labelled images, into the run's folder."""
    classes: ClassOrder | None = None
    """Teachers: the order of its classes where it is not the data's: `natural`, that of timm's train.py, or all names."""

    @property
    def fits_head(self) -> bool:
        return self.head == FIT


class Steps(Section):
    batch_size: Annotated[int, Field(gt=0, le=2**20)]
    """Global: over all processes and accumulated steps."""
    accumulate: Positive = 1
    """Micro-batches per optimiser step."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    channels_last: bool = False
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the exponential moving average of the student's weights, which is then evaluated and exported."""
    sync_batchnorm: bool = False
    save_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Between checkpoints; every validation writes one too. 0: one after every step."""
    skip_nonfinite: Annotated[int, Field(ge=0)] = 0
    """Steps of a run that may be left out because the loss or the gradient is not finite. Above 0, a GPU is
    waited for in every step."""
    log_every: Positive = 50
    """Steps between log lines; losses are read from the device only then."""


class Train(Steps):
    epochs: Positive
    eval_every: Annotated[float, Field(gt=0)] = 1
    """Epochs between validations; 0.25 for four in each."""


class DistillationTrain(Train):
    compile: bool = False
    """The teacher's pass, the student and the methods through torch.compile. The first step takes a minute or more for
    it, at every start; losses and gradients are the same but for rounding (docs/performance.md)."""


class BaseOptim(Section):
    name: str = "adamw"
    """A timm optimiser name."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from timm.optim import list_optimizers

        if name not in list_optimizers():
            raise ValueError(f"timm has no optimiser `{printable(name)}`.{nearest(name, list_optimizers())}")
        return name

    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    momentum: Share = 0.9
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8


class Optim(BaseOptim):
    decay_norm_and_bias: bool = False
    """Apply weight decay to biases and normalisation layers too."""
    projector_lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the method's own parameters, as a multiple of `lr`."""


class Schedule(Section):
    name: Literal["cosine", "multistep"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    milestones: tuple[Positive, ...] = (30, 60, 90)
    """Epochs at which `multistep` multiplies the rate by `decay_rate`."""
    decay_rate: Share = 0.1


class Config(Section):
    name: Annotated[str, Field(pattern=r"^\w[\w .+-]*$")]
    """The run's; its folder is runs/NAME unless --out says otherwise."""
    seed: Seed = 0
    data: Data
    augment: Augment = Augment()
    student: Model
    teacher: Model | None = None
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], Model] = {}
    """Several, by name, in place of `teacher`: the mean of their logits, and every other method once for each."""
    assistant: dict[str, Any] | None = None
    """A student to train first, which is then the teacher: what its recipe has different from this one, such as
    {student: {model: resnet50}}. It may have an assistant itself."""
    losses: dict[str, dict[str, Any]]
    """Method name -> its options, `weight` (1 unless given), and `teachers`, the names of those that it reads (all)."""
    train: DistillationTrain
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Where scalars go beside the run's log.jsonl (docs/trackers.md); [] for nowhere."""

    @field_validator("losses", mode="before")
    @classmethod
    def _complete_losses(cls, losses: Any) -> Any:
        if not isinstance(losses, dict):
            raise ValueError("losses: a mapping of method names to options, such as {ce: {}, kd: {temperature: 1.0}}")
        kept = {name: {} if options is None else options for name, options in losses.items() if options is not False}
        problems = [line for name, options in kept.items() for line in method_problems(name, options)]
        if not kept:
            problems.append("losses: none at all; name at least one, such as ce")
        if problems:
            raise ValueError("\n".join(problems))
        return {name: typed_options(name, options) for name, options in kept.items()}

    @property
    def all_teachers(self) -> dict[str, Model]:
        """By name; a single one's is `teacher`."""
        return self.teachers if self.teacher is None else {"teacher": self.teacher}

    def place_of(self, teacher: str) -> str:
        """Where the recipe describes a teacher, by its name in `all_teachers`."""
        return f"teachers.{teacher}" if teacher in self.teachers else "teacher"

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problems = misfits(self)
        if self.assistant is not None and not problems:
            problems += _assistant_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _assistant_problems(config: Config) -> list[str]:
    if not config.all_teachers:
        return ["assistant: it needs a teacher itself; name one, or leave it out"]
    if chosen := [name for name, options in config.losses.items() if "teachers" in options]:
        return [f"losses.{chosen[0]}.teachers: the student's teacher is the assistant; say that in assistant.losses"]
    try:
        assistant_of(config)
    except UserError as error:
        return [f"assistant: {line.removeprefix('  - ')}" for line in str(error).splitlines()[1:]] or [str(error)]
    return []


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """A shipped recipe's name or a YAML file, with `section.key=value` overrides (values are YAML).

    Raises `UserError` that lists every problem, each with the nearest valid name.
    """
    values = recipe_values(recipe)
    for text in overrides:
        override(values, text)
    return check_config(values, recipe)


def check_config(values: dict[str, Any], where: str) -> Config:
    """Validates plain values; `UserError` with all problems at once. Models named by a folder are written out."""
    return checked_as(Config, values, where)


def checked_as(schema: type[S], values: dict[str, Any], where: str) -> S:
    """`check_config` for the recipe of any task."""
    from .model_folders import with_folders

    try:
        values = with_folders(values) if isinstance(values, dict) else values
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        lines = [line for e in errors[:MOST_PROBLEMS] for line in described(dict(e), schema)]
    count = len(lines) + max(0, len(errors) - MOST_PROBLEMS)
    listed = [f"  - {shortened(line)}" for line in lines[:MOST_PROBLEMS]]
    if count > MOST_PROBLEMS:
        listed.append(f"  - and {count - MOST_PROBLEMS} more")
    raise UserError(f"{where}: {count} problem{'s' * (count > 1)}\n" + "\n".join(listed))


def described(error: dict[str, Any], schema: type[Section]) -> list[str]:
    """What pydantic found wrong with values of `schema`, for people: place, problem, nearest name."""
    path = [str(part) for part in error["loc"]]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        return [f"{where}: unknown.{nearest(path[-1], _fields_at(path[:-1], schema))}"]
    if error["type"] == "missing":
        return [f"{where}: missing"]
    if error["type"] == "value_error":
        whole = where in ("", "losses")  # those name the place themselves
        return [line if whole else f"{where}: {line}" for line in str(error["ctx"]["error"]).splitlines()]
    if error["type"] == "model_type":
        return [
            f"{where}: keys and values are needed, such as {where}: {{key: value}} (given {reprlib.repr(error['input'])})"
        ]
    return [f"{where}: {error['msg']} (given {reprlib.repr(error['input'])})"]


def _fields_at(path: list[str], schema: type[Section]) -> list[str]:
    section: Any = schema
    parts = iter(path)
    for part in parts:
        annotation = section.model_fields[part].annotation
        if typing.get_origin(annotation) is dict:
            next(parts, None)  # the name that a person gave one of them
        section = next(
            (a for a in (annotation, *typing.get_args(annotation)) if inspect.isclass(a) and issubclass(a, Section)),
            schema,
        )
    return list(section.model_fields)


def assistant_of(config: Config) -> Config:
    """The recipe of a recipe's assistant: the recipe itself with what `assistant` says in its place. Raises `UserError`."""
    values = config.model_dump(mode="json", exclude={"assistant"}) | {"name": f"{config.name}-assistant"}
    return check_config(merged(values, config.assistant or {}), "assistant")


def to_yaml(config: Section) -> str:
    """A recipe with nothing left to defaults, the methods' included: it says the same after a default has changed."""
    values = config.model_dump(mode="json")
    if isinstance(config, Config):
        values["losses"] = written_out(config.losses)
    return yaml.safe_dump(values, sort_keys=False)
