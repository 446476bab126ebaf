"""A ladder file: which methods, students and seeds a comparison runs, as differences to one recipe."""

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
from scalekd.common.yaml_file import parse_yaml
from scalekd.config.files import merged, override, recipe_names, recipe_text, recipe_values, shipped
from scalekd.config.losses import reads_logits
from scalekd.config.recipe import Config, check_config

LADDERS = "compare/ladders"
Label = Annotated[str, Field(pattern=r"^[\w(][\w .+,()=&/-]*$", max_length=60)]


class Ladder(Section):
    """Methods x students x seeds. A method and a student say what differs from `recipe`, as a recipe with a `base` does.

    `{seed}` in a value stands for the run's seed: `data: {seed: "{seed}"}` draws the labels anew for each.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    title: str = ""
    recipe: str
    """What all runs share: a shipped recipe's name, or a YAML file beside this one."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Sections of the recipe that differ in every run."""
    students: dict[Label, dict[str, Any]] = Field(default_factory=dict)
    """Label -> sections; the recipe's own student where there are none."""
    methods: dict[Label, dict[str, Any]]
    """Label -> sections: `losses`, and whatever else makes the method, such as `teacher: null`."""
    baseline: str
    """The method that gains are against."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)

    @field_validator("students", "methods")
    @classmethod
    def _of_sections(cls, entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        fields = [*Config.model_fields]
        for label, sections in entries.items():
            for key in sections:
                if key not in fields or key in ("name", "seed"):
                    raise ValueError(
                        f"{label}: `{key}` is no section of a recipe that may differ.{nearest(key, fields)}"
                    )
        return entries

    @model_validator(mode="after")
    def _fits_together(self) -> Ladder:
        if self.baseline not in self.methods:
            raise ValueError(f"baseline: no method `{self.baseline}`.{nearest(self.baseline, self.methods)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: one or more, each once (given {list(self.seeds)})")
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
        """Under the comparison's runs/."""
        return Path(plain(self.student)) / plain(self.method) / f"seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.student} {self.method} seed {self.seed}"


def plain(label: str) -> str:
    """A label as a folder's name."""
    return "".join(c if c.isalnum() or c in "+.-" else "_" for c in label)


def ladder_names() -> list[str]:
    return list(shipped(LADDERS))


def ladder_text(ladder: str) -> str:
    """The YAML of a shipped ladder's name or of a file. Raises `UserError`."""
    files = shipped(LADDERS)
    if ladder in files:
        return files[ladder].read_text()
    if not is_file(Path(ladder)):
        raise UserError(
            f"no ladder `{ladder}`: neither a file nor a shipped one.{nearest(ladder, files)} "
            f"Shipped: {', '.join(files)}."
        )
    return recipe_text(ladder)


def load_ladder(ladder: str) -> Ladder:
    """A shipped ladder's name or a YAML file. Raises `UserError` with all problems."""
    values = parse_yaml(ladder_text(ladder), ladder)
    if not isinstance(values, dict):
        raise UserError(f"{ladder} is not a ladder: it must be a mapping with recipe, methods, baseline, ...")
    try:
        loaded = Ladder.model_validate(values)
    except ValidationError as error:
        lines = [line for e in error.errors() for line in described(dict(e), Ladder)]
        raise UserError(f"{ladder}: " + "\n  - ".join([f"{len(lines)} problem(s)", *lines])) from None
    beside = Path(ladder).parent / loaded.recipe
    if loaded.recipe not in recipe_names() and is_file(beside):
        loaded = loaded.model_copy(update={"recipe": str(beside)})
    if len({plain(m) for m in loaded.methods}) < len(loaded.methods):
        raise UserError(f"{ladder}: methods: two labels give the same folder name")
    return loaded


def chosen(
    ladder: Ladder, students: Sequence[str], methods: Sequence[str], seeds: int | None, student: object = None
) -> Ladder:
    """A part of a ladder; the baseline stays. Empty lists and None: all. Raises `UserError` for an unknown label.

    student: given for all runs; an error where the ladder has students of its own.
    """
    if student and ladder.students:
        raise UserError(f"`student`: this ladder has its own: {', '.join(ladder.students)}")
    for kind, wanted, there in (("student", students, ladder.students), ("method", methods, ladder.methods)):
        if unknown := [w for w in wanted if w not in there]:
            raise UserError(f"the ladder has no {kind} `{unknown[0]}`.{nearest(unknown[0], there)}")
    if seeds is not None and seeds < 1:
        raise UserError(f"`seeds` {seeds}: must be 1 or more")
    more = [*ladder.seeds, *(s for s in range(seeds or 0) if s not in ladder.seeds)]
    return ladder.model_copy(
        update={
            "students": {k: v for k, v in ladder.students.items() if not students or k in students},
            "methods": {k: v for k, v in ladder.methods.items() if not methods or k in (*methods, ladder.baseline)},
            "seeds": tuple(more[: seeds or len(more)]),
        }
    )


def jobs(ladder: Ladder, overrides: Iterable[str] = ()) -> list[Job]:
    """Every run, seed by seed: what is there after a stop compares. Raises `UserError` with every run's problems.

    overrides: `section.key=value`, for every run; one that a student or method sets itself is refused.
    """
    shared = merged(recipe_values(ladder.recipe), copy.deepcopy(ladder.set))
    for text in overrides:
        override(shared, text)
    students = ladder.students or {str((shared.get("student") or {}).get("model", "student")): {}}
    found: list[Job] = []
    problems: dict[str, str] = {}
    for student, of_student in students.items():
        for method, of_method in ladder.methods.items():
            values = copy.deepcopy(merged(merged(shared, of_student), of_method))
            values["name"] = plain(f"{ladder.name}-{student}-{method}")
            try:
                for text in overrides:
                    _expect_kept(text, shared, values, f"{student}, {method}")
                for seed in ladder.seeds:
                    config = check_config(with_seed(values, seed) | {"seed": seed}, f"{student}, {method}")
                    found.append(Job(student, method, seed, config))
            except UserError as error:
                first, _, rest = str(error).partition("\n")
                problems.setdefault(rest or first, first)
    problems |= _not_comparable(found)
    if problems:
        raise UserError("\n".join(f"{first}\n{rest}" for rest, first in problems.items()))
    return sorted(found, key=lambda job: ladder.seeds.index(job.seed))


def _not_comparable(found: Iterable[Job]) -> dict[str, str]:
    """Why runs cannot stand in one table, and where."""
    problems = {}
    kinds: dict[bool, Job] = {}
    for job in found:
        if job.config.assistant is not None:
            problems["  - assistant: a comparison is of single runs; name a finished assistant's run as teacher"] = (
                f"{job.student}, {job.method}: 1 problem"
            )
        if any(spec.fits_head for spec in job.config.all_teachers.values()):
            problems[
                "  - teacher.head: the runs of a comparison share their teacher; fit its head once with `scalekd head`, "
                "and name that folder"
            ] = f"{job.student}, {job.method}: 1 problem"
        kinds.setdefault(any(map(reads_logits, job.config.losses)), job)
    if len(kinds) > 1:
        problems[
            "  - losses: none reads the student's logits; its top-1 would be of neighbours, the others' is not"
        ] = f"{kinds[False].student}, {kinds[False].method}: 1 problem"
    return problems


def with_seed(value: Any, seed: int) -> Any:
    """Plain values in which `{seed}` is replaced by the seed in every text."""
    if isinstance(value, dict):
        return {key: with_seed(inner, seed) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_seed(inner, seed) for inner in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def _expect_kept(text: str, shared: dict[str, Any], values: dict[str, Any], where: str) -> None:
    key = text.partition("=")[0]
    section, *rest = key.split(".")
    if values.get(section) is None:  # such as the teacher of a method without one
        return
    there: Any = shared
    here: Any = values
    for part in (section, *rest):
        there = there.get(part) if isinstance(there, dict) else None
        here = here.get(part) if isinstance(here, dict) else None
    if there != here:
        raise UserError(f"{where}: `{text}` has no effect: the ladder sets {key} itself")
