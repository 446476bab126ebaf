"""A run, described: YAML recipe + `key=value` overrides -> `Config`, with all errors told at once."""

from __future__ import annotations

import inspect
import re
import reprlib
import typing
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import UserError, nearest, printable, shortened
from .files import is_file
from .yaml_file import parse_yaml

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Pixels = Annotated[int, Field(gt=0, lt=2**16)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _one_message(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:  # one for each form; people want one
        raise ValueError(f"pixels, such as 224 or [192, 256] for height and width (given {_short(value)})") from None


def _natural_or_names(value: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            "`natural`, or the names of the data's classes in the teacher's order, those like numbers in quotes "
            f"(given {_short(value)})"
        ) from None


ClassOrder = Annotated[Literal["natural"] | tuple[str, ...], WrapValidator(_natural_or_names)]
ImageSize = Annotated[Pixels | tuple[Pixels, Pixels], WrapValidator(_one_message)]
LossWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FIT = "fit"  # of `teacher.head`, in place of a folder
OF_ANY_LOSS: dict[str, Any] = {"weight": LossWeight, "teachers": list[str]}  # options beside the method's own


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
        problems = [line for name, options in kept.items() for line in _method_problems(name, options)]
        if not kept:
            problems.append("losses: none at all; name at least one, such as ce")
        if problems:
            raise ValueError("\n".join(problems))
        return {name: _typed_options(name, options) for name, options in kept.items()}

    @property
    def all_teachers(self) -> dict[str, Model]:
        """By name; a single one's is `teacher`."""
        return self.teachers if self.teacher is None else {"teacher": self.teacher}

    def place_of(self, teacher: str) -> str:
        """Where the recipe describes a teacher, by its name in `all_teachers`."""
        return f"teachers.{teacher}" if teacher in self.teachers else "teacher"

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problems = _unlabelled_problems(self)
        needing = [n for n in self.losses if reads_teacher(n)]
        if needing and not self.all_teachers:
            problems.append(
                f"losses: {', '.join(needing)} need(s) a teacher; add `teacher: {{model: ..., weights: ...}}`"
            )
        if not needing and self.teacher is not None:
            problems.append("teacher: no loss uses it; add one (kd, scalekd, ...) or remove the teacher")
        problems += _teachers_problems(self, needing)
        problems += _head_problems(self)
        problems += [
            f"{self.place_of(name)}.classes: its head's names are the data's; leave it out"
            for name, spec in self.all_teachers.items()
            if spec.classes is not None and spec.head is not None
        ]
        if self.train.batch_size % self.train.accumulate:
            problems.append(
                f"train.batch_size {self.train.batch_size} is not a multiple of train.accumulate {self.train.accumulate}"
            )
        if self.schedule.warmup_epochs >= self.train.epochs:
            problems.append(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} leaves nothing of train.epochs {self.train.epochs}; "
                "for a short trial add schedule.warmup_epochs=0"
            )
        problems += _ignored(self)
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


def _teachers_problems(config: Config, needing: list[str]) -> list[str]:
    """What is wrong with several teachers and with the losses that choose among them."""
    chosen = {name: options["teachers"] for name, options in config.losses.items() if "teachers" in options}
    if not config.teachers:
        return [f"losses.{name}.teachers: goes with several teachers, `teachers: {{NAME: ...}}`" for name in chosen]
    if config.teacher is not None:
        return ["teacher: there are `teachers` too; put it among them, or remove them"]
    problems = []
    for name, teachers in chosen.items():
        if name not in needing:
            problems.append(f"losses.{name}.teachers: {name} reads no teacher")
        problems += [
            f"losses.{name}.teachers: no teacher `{shortened(of)}`.{nearest(of, config.teachers)}"
            for of in teachers
            if of not in config.teachers
        ]
        if not teachers:
            problems.append(f"losses.{name}.teachers: names none; leave it out for all of them")
    used = {of for name in needing for of in chosen.get(name, config.teachers)}
    return problems + [f"teachers.{of}: no loss uses it; remove it" for of in config.teachers if of not in used]


def _head_problems(config: Config) -> list[str]:
    if config.data.train is not None:
        return []
    return [
        f"{config.place_of(name)}.head: {FIT} needs labelled images, a data.train; name some, or the folder of a head "
        "(`scalekd head`)"
        for name, spec in config.all_teachers.items()
        if spec.head == FIT
    ]


def _unlabelled_problems(config: Config) -> list[str]:
    from .methods import METHODS

    data, problems = config.data, []
    if data.train is None and data.unlabelled is None:
        return ["data.train: missing; or name images without labels, data.unlabelled"]
    if data.train is None:
        if labels := [n for n in config.losses if getattr(METHODS[n], "needs_targets", False)]:
            problems.append(
                f"losses: {', '.join(labels)} need(s) labels; name a data.train, or turn off: losses.{labels[0]}=off"
            )
        if data.val is None:
            problems.append(
                "data.val: without a data.train, some labelled images are needed to validate on; some hundreds do"
            )
        if data.unlabelled == "rest":
            problems.append("data.unlabelled: rest is what data.limit leaves out of data.train; name a data.train")
    elif data.unlabelled == "rest" and data.limit is None:
        problems.append("data.unlabelled: rest is what data.limit leaves out of data.train; set data.limit")
    if data.unlabelled is not None and config.augment.repeats > 1:
        problems.append("augment.repeats: goes with labelled images only; leave it out, or data.unlabelled")
    return problems


def _ignored(config: Config) -> list[str]:
    """Values that were changed and that nothing would read."""
    augment, schedule = config.augment, config.schedule
    return unread(config.optim) + without_effect(
        [
            (augment.crop != "random_resized", "augment.scale", augment, "augment.crop: random_resized"),
            (augment.crop != "pad", "augment.pad", augment, "augment.crop: pad"),
            (
                augment.auto_augment is not None,
                "augment.color_jitter",
                augment,
                "no augment.auto_augment, which brings its own",
            ),
            *idle_in(schedule),
            (config.data.on_bad_image == "error", "data.max_bad", config.data, "data.on_bad_image: skip"),
            (config.data.val is not None, "data.val_fraction", config.data, "no data.val"),
            (
                config.data.val is not None and config.data.limit is None and config.data.unlabelled_limit is None,
                "data.seed",
                config.data,
                "data.limit or no data.val; a run's own seed is `seed`",
            ),
            (
                config.data.train is None,
                "data.limit",
                config.data,
                "a data.train; data.unlabelled_limit is the other's",
            ),
            (config.data.unlabelled is None, "data.unlabelled_limit", config.data, "data.unlabelled"),
            (
                config.data.unlabelled is None or config.data.train is None,
                "data.unlabelled_share",
                config.data,
                "both data.train and data.unlabelled",
            ),
            (True, "student.image_size", config.student, "a teacher; the student's is data.image_size"),
            (True, "student.top1", config.student, "a teacher"),
            (True, "student.head", config.student, "a teacher"),
            (True, "student.classes", config.student, "a teacher"),
        ]
    )


Idle = tuple[bool, str, Section, str]  # whether a field is not read, its name, the section it is in, what it goes with


def idle_in(schedule: Schedule) -> list[Idle]:
    """The fields that a schedule of its kind does not read."""
    return [
        (schedule.name != "multistep", "schedule.milestones", schedule, "schedule.name: multistep"),
        (schedule.name != "multistep", "schedule.decay_rate", schedule, "schedule.name: multistep"),
        (schedule.name != "cosine", "schedule.min_lr", schedule, "schedule.name: cosine"),
        (schedule.warmup_epochs == 0, "schedule.warmup_lr", schedule, "schedule.warmup_epochs above 0"),
    ]


def unread(optim: BaseOptim) -> list[str]:
    """Values of `optim` that were changed and that its optimiser does not have."""
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(optim.name)
    return without_effect(
        [
            (not info.has_betas, "optim.betas", optim, "an optimiser with betas"),
            (not info.has_eps, "optim.eps", optim, "an optimiser with eps"),
            (not info.has_momentum, "optim.momentum", optim, "an optimiser with momentum"),
        ]
    )


def without_effect(idle: Iterable[Idle]) -> list[str]:
    return [
        f"{name}: has no effect here; it goes with {needs}"
        for not_read, name, section, needs in idle
        if not_read and _changed(section, name.split(".")[1])
    ]


def _changed(section: Section, field: str) -> bool:
    return getattr(section, field) != type(section).model_fields[field].default


def reads_teacher(loss: str) -> bool:
    """Whether a loss of a recipe, or a method, reads a teacher."""
    from .methods import METHODS

    return getattr(METHODS[loss], "needs_teacher", True)


def reads_logits(loss: str) -> bool:
    """Whether a loss of a recipe reads the student's logits."""
    from .methods import METHODS

    method = METHODS[loss]
    return getattr(method, "needs_logits", not getattr(method, "needs_maps", True))


# ---------------------------------------------------------------- method options


def options_of(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword options of a method, annotations resolved; the one place where its defaults live."""
    function = method.__init__ if inspect.isclass(method) else method
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.replace(annotation=hints[p.name]) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _method_problems(name: str, options: Any) -> list[str]:
    from .methods import METHODS

    if name not in METHODS:
        return [f"losses.{name}: unknown method.{nearest(str(name), METHODS)}"]
    if not isinstance(options, dict):
        return [
            f"losses.{name}: options are a mapping, not {_short(options)}; write {{}} for none, or losses.{name}=off to leave it out"
        ]
    known: dict[str, Any] = {k: p.annotation for k, p in options_of(METHODS[name]).items()} | OF_ANY_LOSS
    problems = [f"losses.{name}.{k}: unknown option.{nearest(str(k), known)}" for k in options if k not in known]
    for key, value in options.items():
        if isinstance(value, bool) and known.get(key, bool) is not bool:
            problems.append(f"losses.{name}.{key}: true and false are no value for it (given {value})")
        try:
            if key in known:
                _adapter(known[key]).validate_python(value)
        except ValidationError as error:
            problems += [f"losses.{name}.{key}: {e['msg']} (given {_short(value)})" for e in error.errors()[:1]]
    return problems


def _typed_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    from .methods import METHODS

    known: dict[str, Any] = {k: p.annotation for k, p in options_of(METHODS[name]).items()} | OF_ANY_LOSS
    return {k: _adapter(known[k]).validate_python(v) for k, v in options.items()}


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


# ---------------------------------------------------------------- from recipe files


class Shelf(NamedTuple):
    """The recipes that come with scalekd for a task."""

    folder: str
    """In the package."""
    command: str
    """Lists them."""


DISTILLATION = Shelf("recipes", "scalekd recipes")


def shipped(folder: str) -> dict[str, Any]:
    """The YAML files of a folder of the package, by name without the ending, in order."""
    files = {p.name.removesuffix(".yaml"): p for p in (resources.files("scalekd") / folder).iterdir()}
    return {name: files[name] for name in sorted(files) if files[name].name.endswith(".yaml")}


def recipe_names(shelf: Shelf = DISTILLATION) -> list[str]:
    return list(shipped(shelf.folder))


def recipe_text(recipe: str, shelf: Shelf = DISTILLATION) -> str:
    """The YAML of a shipped recipe's name or of a file."""
    files = shipped(shelf.folder)
    if recipe in files:
        return files[recipe].read_text()
    path = Path(recipe)
    if not is_file(path):
        raise UserError(
            f"no recipe `{shortened(recipe)}`: neither a file nor a shipped one.{nearest(recipe, files)} "
            f"`{shelf.command}` lists them."
        )
    try:
        return path.read_text()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{recipe} cannot be read as text: {error}") from None


def load_recipe(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """A shipped recipe's name or a YAML file, with `section.key=value` overrides (values are YAML).

    Raises `UserError` that lists every problem, each with the nearest valid name.
    """
    values = recipe_values(recipe)
    for text in overrides:
        override(values, text)
    return check_config(values, recipe)


def recipe_values(recipe: str, within: tuple[str, ...] = (), shelf: Shelf = DISTILLATION) -> dict[str, Any]:
    """What a recipe says, with what its `base` says where it says nothing itself (`merged`).

    within: the recipes whose base this one is.
    """
    values = parse_yaml(recipe_text(recipe, shelf), recipe)
    if not isinstance(values, dict):
        raise UserError(f"{recipe} is not a recipe: it must be a mapping with data, student, losses, train, ...")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{recipe}: base: the name of a recipe or a YAML file (given {_short(base)})")
    beside = Path(recipe).parent / base
    if base not in recipe_names(shelf) and is_file(beside):
        base = str(beside)
    if base in (*within, recipe):
        raise UserError(f"{recipe}: base: {shortened(base)} is made from this recipe; name another")
    try:
        return merged(recipe_values(base, (*within, recipe), shelf), values)
    except UserError as error:
        raise UserError(f"{recipe}: base: {error}") from None


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in their place, section by section and key by key.

    Whole are replaced: `losses`, and a student or teacher that names a model, so that no option of another model stays.
    """
    result = dict(values)
    for section, change in changes.items():
        before = values.get(section)
        whole = section == "losses" or (isinstance(change, dict) and "model" in change)
        both = isinstance(before, dict) and isinstance(change, dict)
        result[section] = before | change if both and not whole else change
    return result


def override(values: dict[str, Any], assignment: str) -> None:
    """Sets the value that `section.key=value` names, in place. Raises `UserError`."""
    key, equals, text = assignment.partition("=")
    shown = shortened(assignment)
    if not equals or not key or not key.isprintable():
        raise UserError(f"`{shown}` is not an override: write key=value, such as optim.lr=1e-3")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"`{shown}`: {parent} is a value, it has no `{last}`")
        values = inner
    values[last] = parse_yaml(text, f"`{shown}`")


MOST_PROBLEMS = 30


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
            f"{where}: keys and values are needed, such as {where}: {{key: value}} (given {_short(error['input'])})"
        ]
    return [f"{where}: {error['msg']} (given {_short(error['input'])})"]


def _short(value: Any) -> str:
    return reprlib.repr(value)


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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
