"""Reads a ladder file: the methods, students and seeds of a comparison, as changes to one recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from scalekd.common.errors import UserError, nearest
from scalekd.common.files import is_file
from scalekd.common.sections import Section, Seed, described
from scalekd.common.text import printable
from scalekd.common.yaml_file import parse_yaml
from scalekd.config.losses import reads_logits
from scalekd.config.recipe import Config, check_config
from scalekd.config.recipe_files import merged, override, recipe_names, recipe_text, recipe_values, shipped

LADDERS = "compare/ladders"
Label = Annotated[str, Field(pattern=r"^[\w(][\w .+,()=&/-]*$", max_length=60)]


class Ladder(Section):
    """Methods x students x seeds. Each method and student lists its changes to `recipe`, as a recipe with a `base` does.

    `{seed}` in a value is replaced by the run's seed: `data: {seed: "{seed}"}` draws other labels for each seed.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    title: str = ""
    recipe: str
    """The recipe that all runs share: a shipped recipe's name, or a YAML file in the ladder's folder."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to sections of the recipe, for every run."""
    students: dict[Label, dict[str, Any]] = Field(default_factory=dict)
    """Label -> changed sections. Without students, the recipe's own student."""
    methods: dict[Label, dict[str, Any]]
    """Label -> changed sections: `losses`, and what else the method needs, such as `teacher: null`."""
    baseline: str
    """The method that gains are measured against."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)

    @field_validator("students", "methods")
    @classmethod
    def _only_sections(cls, entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        fields = [*Config.model_fields]
        for label, sections in entries.items():
            for key in sections:
                if key not in fields or key in ("name", "seed"):
                    raise ValueError(
                        f"{label}: `{key}` is not a recipe section that a ladder may change.{nearest(key, fields)}"
                    )
        return entries

    @model_validator(mode="after")
    def _fits_together(self) -> Ladder:
        if self.baseline not in self.methods:
            raise ValueError(
                f"baseline: the ladder has no method `{self.baseline}`.{nearest(self.baseline, self.methods)}"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: give one or more, each once (got {list(self.seeds)})")
        return self


@dataclass(frozen=True)
class Job:
    """One run of a ladder."""

    student: str
    method: str
    seed: int
    config: Config = field(compare=False)

    @property
    def folder(self) -> Path:
        """The run's folder, relative to the comparison's runs/."""
        return Path(plain(self.student)) / plain(self.method) / f"seed-{self.seed}"

    def __str__(self) -> str:
        return printable(f"{self.student} {self.method} seed {self.seed}")


def plain(label: str) -> str:
    """A label as a folder name: letters, digits and `+.-` are kept."""
    return "".join(c if c.isalnum() or c in "+.-" else "_" for c in label)


def ladder_names() -> list[str]:
    return list(shipped(LADDERS))


def ladder_text(ladder: str) -> str:
    """The YAML text of a shipped ladder or of a file. Raises `UserError` if there is neither."""
    files = shipped(LADDERS)
    if ladder in files:
        return files[ladder].read_text()
    if not is_file(Path(ladder)):
        raise UserError(
            f"no ladder `{ladder}`: it is neither a file nor a shipped ladder.{nearest(ladder, files)} "
            f"Shipped: {', '.join(files)}."
        )
    return recipe_text(ladder)


def load_ladder(ladder: str) -> Ladder:
    """Loads a shipped ladder or a YAML file. Raises `UserError` that lists all problems."""
    values = parse_yaml(ladder_text(ladder), ladder)
    if not isinstance(values, dict):
        raise UserError(f"{ladder} is not a ladder: write a mapping with the keys recipe, methods, baseline, ...")
    try:
        loaded = Ladder.model_validate(values)
    except ValidationError as error:
        lines = [line for e in error.errors() for line in described(dict(e), Ladder)]
        raise UserError(f"{ladder}: " + "\n  - ".join([f"{len(lines)} problem(s)", *lines])) from None
    file = Path(ladder).parent / loaded.recipe
    if loaded.recipe not in recipe_names() and is_file(file):
        loaded = loaded.model_copy(update={"recipe": str(file)})
    for kind, labels in (("methods", loaded.methods), ("students", loaded.students)):
        by_folder: dict[str, str] = {}
        for label in labels:
            if (other := by_folder.setdefault(plain(label), label)) != label:
                raise UserError(f"{ladder}: {kind}: `{other}` and `{label}` give the same folder name; rename one")
    return loaded


def chosen(
    ladder: Ladder, students: Sequence[str], methods: Sequence[str], seeds: int | None, student: object = None
) -> Ladder:
    """The part of `ladder` with these students, methods and number of seeds. The baseline always stays.

    Empty lists and None select everything. More seeds than the ladder has are filled up from 0, 1, 2, ...
    student: a student for all runs; an error if the ladder has students of its own.
    Raises `UserError` for an unknown label or fewer than one seed.
    """
    if student and ladder.students:
        raise UserError(f"`student`: this ladder sets its own students ({', '.join(ladder.students)}); leave it out")
    for kind, wanted, labels in (("student", students, ladder.students), ("method", methods, ladder.methods)):
        if unknown := [w for w in wanted if w not in labels]:
            raise UserError(f"the ladder has no {kind} `{unknown[0]}`.{nearest(unknown[0], labels)}")
    if seeds is not None and seeds < 1:
        raise UserError(f"`seeds` {seeds}: must be 1 or more")
    available = [*ladder.seeds, *(s for s in range(seeds or 0) if s not in ladder.seeds)]
    return ladder.model_copy(
        update={
            "students": {k: v for k, v in ladder.students.items() if not students or k in students},
            "methods": {k: v for k, v in ladder.methods.items() if not methods or k in (*methods, ladder.baseline)},
            "seeds": tuple(available[: seeds or len(available)]),
        }
    )


def jobs(ladder: Ladder, overrides: Iterable[str] = ()) -> list[Job]:
    """Every run of `ladder`, seed by seed, so that an interrupted comparison has complete seeds.

    overrides: `section.key=value`, for every run. A key that a student or method sets itself cannot be overridden.
    Raises `UserError` with the problems of all runs.
    """
    shared = merged(recipe_values(ladder.recipe), copy.deepcopy(ladder.set))
    for text in overrides:
        override(shared, text)
    students = ladder.students or {str((shared.get("student") or {}).get("model", "student")): {}}
    planned: list[Job] = []
    problems: dict[str, str] = {}  # problem -> the first run that has it
    for student, student_sections in students.items():
        for method, method_sections in ladder.methods.items():
            values = copy.deepcopy(merged(merged(shared, student_sections), method_sections))
            values["name"] = plain(f"{ladder.name}-{student}-{method}")
            try:
                for text in overrides:
                    _expect_kept(text, shared, values, f"{student}, {method}")
                for seed in ladder.seeds:
                    config = check_config(with_seed(values, seed) | {"seed": seed}, f"{student}, {method}")
                    planned.append(Job(student, method, seed, config))
            except UserError as error:
                first, _, rest = str(error).partition("\n")
                problems.setdefault(rest or first, first)
    problems |= _not_comparable(planned)
    if problems:
        raise UserError("\n".join(f"{first}\n{rest}" for rest, first in problems.items()))
    return sorted(planned, key=lambda job: ladder.seeds.index(job.seed))


def _not_comparable(planned: Iterable[Job]) -> dict[str, str]:
    """Why runs cannot be compared in one table: problem -> the first run that has it."""
    problems = {}
    kinds: dict[bool, Job] = {}  # whether a loss reads the student's logits -> the first such run
    fitting: Job | None = None  # the first run with a head to fit
    for job in planned:
        if job.config.assistant is not None:
            problems["  - assistant: a comparison trains no assistants; train it first and name its run as teacher"] = (
                f"{job.student}, {job.method}: 1 problem"
            )
        if fits_heads(job.config):
            fitting = fitting or job
            if any(getattr(job.config, key) != getattr(fitting.config, key) for key in ("data", "teacher", "teachers")):
                problems.setdefault(
                    "  - teacher.head: `fit` fits one head for all runs, and their teachers or data differ; fit the heads "
                    "with `scalekd head` and name their folders",
                    f"{job.student}, {job.method}: 1 problem",
                )
        kinds.setdefault(any(map(reads_logits, job.config.losses)), job)
    if len(kinds) > 1:
        problems[
            "  - losses: none reads the student's logits, so its top-1 is by nearest neighbours and the others' is not"
        ] = f"{kinds[False].student}, {kinds[False].method}: 1 problem"
    return problems


def fits_heads(config: Config) -> bool:
    """Whether a recipe asks for a head to be fitted."""
    return any(spec.fits_head for spec in config.all_teachers.values())


def with_seed(value: Any, seed: int) -> Any:
    """`value` with `{seed}` replaced by the seed in every string, in nested dicts and lists too."""
    if isinstance(value, dict):
        return {key: with_seed(inner, seed) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_seed(inner, seed) for inner in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def _expect_kept(text: str, shared: dict[str, Any], values: dict[str, Any], where: str) -> None:
    """Raises `UserError` if a student or method changes the key that the override `text` sets."""
    key = text.partition("=")[0]
    section, *rest = key.split(".")
    if values.get(section) is None:  # such as `teacher: null` of a baseline
        return
    wanted: Any = shared
    actual: Any = values
    for part in (section, *rest):
        wanted = wanted.get(part) if isinstance(wanted, dict) else None
        actual = actual.get(part) if isinstance(actual, dict) else None
    if wanted != actual:
        raise UserError(f"{where}: `{text}` has no effect: the ladder sets {key} itself")
