"""`AdapterSpec`: the document that a person writes. A base model, named adapters, and what to do with them.

Documents are strict, and all their problems come at once, each with its line. Nothing in a document names code: the
model's class follows from the task, a method from its registered type, and there is no key for remote code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from peftc import rules
from peftc.config.base import CONFIG_NAME, ConfigModel, PeftConfig
from peftc.config.files import (
    check_config,
    class_for,
    from_shorthand,
    not_stored,
    of_shorthand,
    place,
    valid_config,
    validated,
)
from peftc.config.kinds import kind_of, use_of
from peftc.config.places import Document, Location
from peftc.config.problems import ModelsAt, Problem, as_validation_error, by_place, models_below, problems
from peftc.config.quantize import contradictions_of_base, missing_packages
from peftc.config.reader import read_document
from peftc.config.sections import SOURCES, BaseSection, ChecksSection, TrainSection, section_of_word
from peftc.config.types import TaskType
from peftc.diagnostics import Diagnostic, PeftcError, Severity, did_you_mean
from peftc.graph.base_ref import BaseRef
from peftc.limits import MAX_ADAPTERS, MOST_TOLD
from peftc.registry.boundary import boundary
from peftc.registry.manager import Registry, default_registry
from peftc.registry.optimizers import find_optimizer, fit_problems, option_problems
from peftc.registry.shorthand import INIT, SAMPLES
from peftc.registry.starts import start_problems

VERSION = 1

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
#: Keys of other libraries that make code named in a file run.
_CODE_KEYS = frozenset({"trust_remote_code", "auto_map"})
_CODE_WHY = "Remote code is never switched on by a file: a document must be safe to read and to share."


def _version(value: Any) -> Any:
    if value != VERSION or isinstance(value, (bool, float)):
        fix = f"Set `version: {VERSION}`, or use a version of peftc that knows it."
        problem = Problem((), rules.WRONG_DOCUMENT(f"Version `{value}` of the document is not known", fix=fix))
        raise as_validation_error([problem])
    return value


def _adapter_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        fix = "Use up to 64 letters, digits, `_` and `-`."
        what = f"`{name}` cannot be the name of an adapter"
        raise as_validation_error([Problem((), rules.ADAPTER_NAME(what, fix=fix))])
    return name


def _not_too_many(value: Any) -> Any:
    """Says so at once, before any of the adapters is looked at."""
    if isinstance(value, Mapping) and len(value) > MAX_ADAPTERS:
        raise ValueError(f"has {len(value):,} adapters, more than {MAX_ADAPTERS}")
    return value


def _adapter(value: Any, handler: Any, info: ValidationInfo) -> PeftConfig:
    """An adapter's options, validated by the class that its type names."""
    if isinstance(value, PeftConfig):
        model: type[PeftConfig] = type(value)
        value = {name: getattr(value, name) for name in model.model_fields}
    else:
        registry = (info.context or {}).get("registry") or default_registry()
        found = class_for(value, registry)
        if isinstance(found, Problem):
            raise as_validation_error([found])
        model = found
        stray = not_stored(model, value)
        if stray:
            raise as_validation_error(stray)
        shorthand = of_shorthand(value, registry)
        if shorthand is not None:
            config, wrong = from_shorthand(model, shorthand)
            if config is None:
                raise as_validation_error(wrong)
            return config
    try:
        return validated(model, value)
    except PeftcError as error:
        raise as_validation_error(Problem((), told) for told in error.diagnostics) from error


AdapterName = Annotated[str, AfterValidator(_adapter_name)]
AdapterConfig = Annotated[
    SerializeAsAny[PeftConfig],
    WrapValidator(_adapter),
    WithJsonSchema({"type": "object", "properties": {"peft_type": {"type": "string"}}, "required": ["peft_type"]}),
]


class AdapterSpec(ConfigModel):
    """A spec. Raises `ConfigError` with everything that is wrong."""

    model_config = ConfigDict(title="spec")

    version: Annotated[Literal[1], BeforeValidator(_version)]
    """Version of the document's form: 1."""
    base: Annotated[BaseSection, BeforeValidator(section_of_word, json_schema_input_type=str | BaseSection)]
    """The base model: a section, or one word (hub id, `./folder`, `file.gguf`, `config.json`)."""
    adapters: Annotated[
        dict[AdapterName, AdapterConfig], Field(min_length=1, max_length=MAX_ADAPTERS), BeforeValidator(_not_too_many)
    ]
    """Adapters by name, each with its `peft_type` and the options of that method."""
    active: list[str] | None = Field(default=None, min_length=1)
    """Names of the adapters that act and are trained; left out, the first one."""
    train: TrainSection | None = None
    """How to train."""
    checks: ChecksSection | None = None
    """What to expect of the plan."""
    output: str | None = Field(default=None, min_length=1)
    """Folder for the trained adapter; a relative path starts at the document."""

    _folder: Path = PrivateAttr(default=Path())
    _samples: dict[str, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_samples(cls, data: Any, handler: Any, info: ValidationInfo) -> Self:
        """How many examples starts read is said among the options of adapters, and is none of them."""
        made: Self = handler(data)
        registry = (info.context or {}).get("registry") or default_registry()
        given = data.get("adapters") if isinstance(data, Mapping) else None
        for name, options in given.items() if isinstance(given, Mapping) else ():
            shorthand = of_shorthand(options, registry)
            if shorthand is not None and shorthand.samples is not None:
                made._samples[name] = shorthand.samples
        return made

    @model_validator(mode="after")
    def _agree(self) -> Self:
        found = list(islice(contradictions(self.model_dump()), MOST_TOLD))
        if found:
            raise as_validation_error(found)
        for config in self.adapters.values():
            config.task_type = config.task_type or self.task_type
        return self

    @property
    def active_names(self) -> tuple[str, ...]:
        """Names of the active adapters, in order."""
        return tuple(self.active) if self.active is not None else tuple(self.adapters)[:1]

    def samples_of(self, adapter: str) -> int:
        """How many examples of the training the adapter's start reads, if it reads any."""
        general = TrainSection.model_fields["start_samples"].default if self.train is None else self.train.start_samples
        return self._samples.get(adapter, int(general))

    @property
    def task_type(self) -> TaskType | None:
        """The task, as the base or the adapters say it."""
        said = (config.task_type for config in self.adapters.values())
        return self.base.task_type or next((task for task in said if task is not None), None)

    @property
    def base_ref(self) -> BaseRef:
        """The base model as other parts take it, local paths resolved."""
        base = self.base
        return BaseRef(
            model=base.model,
            path=self._local(base.path),
            gguf=self._local(base.gguf),
            distribution=base.distribution,
            file=base.file,
            config=self._local(base.config) if isinstance(base.config, str) else base.config,
            revision=base.revision,
            task_type=self.task_type,
            dtype=base.dtype,
            quantization=base.quantization,
        )

    def resolve(self, path: str) -> Path:
        """A path of the document: relative ones start at its folder."""
        return self._folder / Path(path).expanduser()

    def _local(self, path: str | None) -> str | None:
        return None if path is None else str(self.resolve(path))


# Checks over several keys: on plain data, so that they run beside whatever else is wrong ---------------------------


def contradictions(data: Any) -> Iterator[Problem]:
    """What is wrong between keys of a spec, as far as the data has the right form."""
    if not isinstance(data, Mapping):
        return
    base, adapters = section_of_word(data.get("base")), data.get("adapters")
    if isinstance(base, Mapping):
        yield from _of_base(base)
    if isinstance(adapters, Mapping) and isinstance(data.get("active"), list):
        yield from _of_active(data["active"], adapters)
    if isinstance(adapters, Mapping):
        yield from _of_tasks(base if isinstance(base, Mapping) else {}, adapters)
    train = data.get("train")
    if isinstance(adapters, Mapping):
        yield from _of_samples(train, adapters)
    if isinstance(train, Mapping) and train.get("epochs") is not None and train.get("steps") is not None:
        what = "Both `epochs` and `steps` say how long to train"
        yield Problem(("train", "steps"), rules.CONTRADICTION(what, fix="Keep one of them."), on_key=True)


def _of_base(base: Mapping[str, Any]) -> Iterator[Problem]:
    given = [name for name in SOURCES if base.get(name) is not None]
    options = "one of `model`, `path`, `gguf`, `distribution` with `file`, and `config`"
    if not given:
        yield Problem(("base",), rules.MISSING_KEY("No base model is named", fix=f"Give {options}."))
    for name in given[1:]:
        what = f"`{given[0]}` and `{name}` both name the base model"
        yield Problem(("base", name), rules.CONTRADICTION(what, fix=f"Give {options}."), on_key=True)
    for name, needed in (("file", "distribution"), ("distribution", "file"), ("revision", "model")):
        if base.get(name) is not None and base.get(needed) is None:
            what = f"`{name}` has no effect without `{needed}`"
            yield Problem(("base", name), rules.CONTRADICTION(what, fix=f"Add `{needed}` or remove it."), on_key=True)
    for problem in contradictions_of_base(base):
        yield replace(problem, location=("base", *problem.location))


def _of_active(active: Sequence[Any], adapters: Mapping[str, Any]) -> Iterator[Problem]:
    named: set[str] = set()
    for index, name in enumerate(active):
        if not isinstance(name, str):
            continue  # told by its type
        if name not in adapters:
            fix = did_you_mean(name, adapters) or f"Defined are {', '.join(adapters)}."
            what = f"`active` names `{name}`, which is not defined"
            yield Problem(("active", index), rules.UNKNOWN_ADAPTER(what, fix=fix))
        elif name in named:
            what = f"`active` names `{name}` twice"
            yield Problem(("active", index), rules.CONTRADICTION(what, fix="Name it once."))
        named.add(name)


def _of_samples(train: Any, adapters: Mapping[str, Any]) -> Iterator[Problem]:
    """Numbers of examples for starts beside what the section says; several adapters, several lines."""
    for name, adapter in adapters.items():
        given = adapter.get(INIT) if isinstance(adapter, Mapping) else None
        samples = given.get(SAMPLES) if isinstance(given, Mapping) else None
        at = ("adapters", name, INIT, SAMPLES)
        if type(samples) is not int:
            continue
        if train is None:
            what = f"`{SAMPLES}` has no effect: the spec has no `train` section, whose data would be read"
            yield Problem(at, rules.WITHOUT_EFFECT(what, fix="Add one, or remove it."), on_key=True)
        general = train.get("start_samples") if isinstance(train, Mapping) else None
        if general is not None and general != samples:
            what = f"`train.start_samples` is {general}, and `{SAMPLES}` here {samples}"
            yield Problem(at, rules.CONTRADICTION(what, fix="Keep one of them."))


def _of_tasks(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> Iterator[Problem]:
    first = base.get("task_type")
    for name, adapter in adapters.items():
        task = adapter.get("task_type") if isinstance(adapter, Mapping) else None
        if task is None:
            continue
        first = first or task
        if task != first:
            what = f"The task is `{first}` above and `{task}` here; one base model serves one task"
            yield Problem(
                ("adapters", name, "task_type"), rules.CONTRADICTION(what, fix=f"Use `{first}` or remove it.")
            )


# Reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A document and what was found in it, in the order of its lines. `spec` is None if there is an error."""

    document: Document
    spec: AdapterSpec | None
    diagnostics: tuple[Diagnostic, ...]


def load_spec(
    path: str | os.PathLike[str], *, base: str | None = None, registry: Registry | None = None
) -> tuple[AdapterSpec, list[Diagnostic]]:
    """The spec in a file, and warnings. Raises `PeftcError` with every problem.

    A plain `adapter_config.json` becomes a spec with one adapter, `default`; its base model is `base` (one word, as in a
    spec), or the one that it names.
    """
    document = read_document(path)
    reading = read_config_as_spec(document, base, registry) if is_config(document) else read_spec(document, registry)
    if reading.spec is None:
        raise PeftcError(reading.diagnostics)
    return reading.spec, list(reading.diagnostics)


def read_spec(document: Document, registry: Registry | None = None) -> Reading:
    """Check a document as a spec."""
    data = document.data
    if not isinstance(data, Mapping):
        what = "The document is empty" if data is None else "The document is not a mapping of keys to values"
        fix = "A spec has `version`, `base` and `adapters`."
        return Reading(
            document, None, (*document.problems, rules.WRONG_DOCUMENT(what, fix=fix, where=document.where()))
        )
    kind = kind_of(data)
    if kind in ("a plan", "a module graph"):
        strange = rules.WRONG_DOCUMENT(f"This is {kind}, not a spec", fix=use_of(kind), where=document.where())
        return Reading(document, None, (strange,))
    registry = registry or default_registry()
    spec, found = None, list(islice(contradictions(data), MOST_TOLD))
    try:
        spec = AdapterSpec.__pydantic_validator__.validate_python(dict(data), context={"registry": registry})
        spec._folder = Path(document.file).parent
    except ValidationError as error:
        found.extend(map(_explain_code, problems(error, data, _models_at(data, registry))))
    adapters = data.get("adapters") if spec is None else spec.adapters
    if isinstance(adapters, Mapping) and len(adapters) <= MAX_ADAPTERS:
        for name, options in adapters.items():
            found.extend(_of_method(options, ("adapters", name), registry, data["adapters"][name]))
    found.extend(_of_optimizer(data, registry))
    if isinstance(data.get("base"), Mapping):
        found.extend(replace(own, location=("base", *own.location)) for own in missing_packages(data["base"]))
    told = in_order(document, found)
    return Reading(document, None if any(d.severity is Severity.ERROR for d in told) else spec, told)


def is_config(document: Document) -> bool:
    """Whether the document is a plain adapter config, not a spec."""
    return isinstance(document.data, Mapping) and "peft_type" in document.data and "adapters" not in document.data


def read_config_as_spec(document: Document, base: str | None, registry: Registry | None = None) -> Reading:
    """Wrap a plain config into a spec with one adapter, `default`."""
    config, told = check_plain(document, registry or default_registry())
    if config is None:
        return Reading(document, None, told)
    name = base or config.base_model_name_or_path
    if not name:
        missing = rules.MISSING_KEY("No base model is named", fix="Name it with `--base`, or write a spec.")
        return Reading(document, None, (*told, place(document, Problem((), missing))))
    section = BaseSection(**section_of_word(name), task_type=config.task_type)
    if base is None and section.model is not None:
        section.revision = config.revision
    spec = AdapterSpec(version=1, base=section, adapters={"default": config})
    return Reading(document, spec, told)


def check_plain(document: Document, registry: Registry) -> tuple[PeftConfig | None, tuple[Diagnostic, ...]]:
    """The plain config in a document, or None if there is an error among the diagnostics."""
    config, found = check_config(document.data, lenient=is_written_by_library(document), registry=registry)
    if config is not None:
        found.extend(_of_method(config, (), registry, document.data))
    told = in_order(document, found)
    return None if any(d.severity is Severity.ERROR for d in told) else config, told


def is_written_by_library(document: Document) -> bool:
    """Whether unknown keys are another version's, and not misspellings: files called `adapter_config.json`."""
    return Path(document.file).name == CONFIG_NAME


def _of_method(options: Any, location: Location, registry: Registry, written: Any) -> Iterator[Problem]:
    """What the method itself says about its options, if they are otherwise valid; `written` is what the document has of them."""
    config = options if isinstance(options, PeftConfig) else valid_config(options, registry)
    if config is None:
        return
    try:
        method = registry.method_of(config)
        with boundary(method.peft_type, "check"):
            said = [*method.problems(config), *start_problems(method, config)]
    except PeftcError as error:
        said = list(error.diagnostics)
    shorthand = of_shorthand(written, registry)
    for diagnostic in said:
        option = diagnostic.where.path
        known = option is not None and option in type(config).model_fields
        at: Location = (option,) if option is not None and known else ()
        yield Problem((*location, *(at if shorthand is None else shorthand.place(at))), diagnostic)


def _of_optimizer(data: Mapping[str, Any], registry: Registry) -> Iterator[Problem]:
    """What is wrong with the optimiser of a spec: its options, and that an active adapter has nothing that it is for."""
    train, adapters, active = (data.get(key) for key in ("train", "adapters", "active"))
    name, options = (
        (train.get("optimizer"), train.get("optimizer_options")) if isinstance(train, Mapping) else (None, None)
    )
    if not isinstance(name, str | None) or not isinstance(options, Mapping | None):
        return  # told by their types
    for problem in option_problems(name, options, registry):
        yield replace(problem, location=("train", *problem.location))
    record = None if name is None else find_optimizer(name, registry)
    if record is None or not isinstance(adapters, Mapping) or len(adapters) > MAX_ADAPTERS:
        return
    names = active if isinstance(active, list) else list(adapters)[:1]
    configs = {
        name: valid_config(adapters[name], registry) for name in names if isinstance(name, str) and name in adapters
    }
    acting = {name: config for name, config in configs.items() if config is not None}
    for problem in fit_problems(record, acting, registry):
        yield replace(problem, location=("train", *problem.location))


def _models_at(data: Mapping[str, Any], registry: Registry) -> ModelsAt:
    """Models at a location of a spec; inside an adapter they follow from its type."""
    of_spec = models_below(AdapterSpec)

    def models_at(location: Location) -> Iterable[type[Any]]:
        if len(location) < 2 or location[0] != "adapters":
            return of_spec(location)
        adapters = data["adapters"]
        found = class_for(adapters.get(location[1]) if isinstance(adapters, Mapping) else None, registry)
        return () if isinstance(found, Problem) else models_below(found)(location[2:])

    return models_at


def _explain_code(problem: Problem) -> Problem:
    """An unknown key that would run code gets its own reason."""
    if problem.on_key and problem.location[-1:] and problem.location[-1] in _CODE_KEYS:
        return replace(problem, diagnostic=replace(problem.diagnostic, why=_CODE_WHY, fix="Remove it."))
    return problem


def in_order(document: Document, found: Iterable[Problem]) -> tuple[Diagnostic, ...]:
    """Diagnostics with their places, each once, in the order of the lines."""
    told = dict.fromkeys([*document.problems, *(place(document, problem) for problem in found)])
    return tuple(sorted(told, key=by_place))
