"""`PeftConfig`: one adapter's options, with the reference's names, defaults and meaning.

A config is a plain mutable object, as users of the reference expect. It is validated when it is made and again when it
is compiled; what is wrong comes out as diagnostics, all at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from peftc import rules
from peftc._version import FILE_VERSION
from peftc.config.fields import OfDataclass
from peftc.config.places import beyond_64_bits, json_path
from peftc.config.problems import Problem, as_custom_error, as_validation_error, models_below, problems, unknown_key
from peftc.config.types import PeftType, TaskType
from peftc.diagnostics import ConfigError, Diagnostic, did_you_mean
from peftc.limits import MAX_INTEGER, MOST_TOLD

CONFIG_NAME = "adapter_config.json"


class ConfigModel(BaseModel):
    """What every piece of a config shares: strict types, and no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = problems(error, values, models_below(type(self)))
            raise ConfigError(tuple(problem.diagnostic for problem in found)) from None

    #: `dataclasses.fields`, `asdict`, `replace` and `is_dataclass` take a config for one, as the reference's are
    __dataclass_fields__ = OfDataclass()
    __dataclass_params__ = OfDataclass()

    def __replace__(self, /, **changes: Any) -> Self:
        """A validated copy with other options, for `copy.replace`. Raises `ConfigError`."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    # pydantic's own mark: a nested config is validated as part of the outer one, which keeps the paths of its problems
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        """In Python a number may be of any size; nothing beyond 64 bits could be saved, or made into a tensor."""
        large = list(islice(beyond_64_bits(self.__dict__), MOST_TOLD))
        if large:
            fix = f"Give a number of at most {MAX_INTEGER:,}."
            told = [(place, f"`{json_path(place, root='')}` does not fit into 64 bits") for place in large]
            raise as_validation_error(Problem(place, rules.NUMBER_BEYOND(what, fix=fix)) for place, what in told)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValueError:
            raise ConfigError(unknown_key([type(self)], name)) from None


@dataclasses.dataclass(frozen=True)
class ConfigFiles:
    """How configs are written and read, for their methods: `peftc.config.files` puts its functions here. It knows the installed
    methods, and so stands above all configs."""

    read: Callable[..., PeftConfig]
    write: Callable[..., object]
    push: Callable[..., object]
    options: Callable[..., dict[str, Any]]
    of_keywords: Callable[..., PeftConfig]


class PeftConfigMixin(ConfigModel):
    """What every config can do: to and from dictionaries, files, and the hub. Raises `ConfigError` on bad values."""

    peft_type: PeftType | None = None
    """The method: the name of an installed plugin, in upper case."""
    task_type: TaskType | None = Field(default=None, strict=False)
    """What the model is for, e.g. `CAUSAL_LM`; decides the model class and the head that is trained along."""
    auto_mapping: dict[str, Any] | None = None
    """Class and library of the base model, written when there is no task type. Never imported from."""
    peft_version: str | None = None
    """The version that wrote the file; one that is made here is of this version."""

    _files: ClassVar[ConfigFiles]

    #: whether the method adds virtual tokens, for who asks the config
    is_prompt_learning: ClassVar[bool] = False
    #: whether it is the reference's method of that name
    is_adaption_prompt: ClassVar[bool] = False

    #: pattern option -> the option that it overrides for the modules it matches, e.g. `{"rank_pattern": "r"}`
    pattern_options: ClassVar[Mapping[str, str]] = {}

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if self.peft_version is None:  # only here: one that is read keeps what its file says, or that it says nothing
            self.__dict__["peft_version"] = FILE_VERSION

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        """Whether class and options are the same; which version wrote the file that they come from is no option."""
        if type(other) is not type(self):
            return NotImplemented
        return {**self.__dict__, "peft_version": None} == {**other.__dict__, "peft_version": None}

    def to_dict(self) -> dict[str, Any]:
        """All options that go into a file, sets left as sets; `type(self)(**d)` accepts the result."""
        return self.model_dump()

    def to_json(self) -> dict[str, Any]:
        """The same, of JSON types only; sets become sorted lists."""
        return self.model_dump(mode="json")

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write `adapter_config.json` into the folder, which is made if needed.

        `auto_mapping_dict` is written as `auto_mapping`; further keywords are ignored. Raises `PeftcError`.
        """
        self._files.write(self, save_directory, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: Sequence[str] | None = None,
    ) -> Any:
        """Upload `adapter_config.json` to a repository, which is made if needed; its card stays as it is, but for `tags`.

        Returns the address of the commit. Raises `PeftcError` if the hub does not take it.
        """
        from peftc.config.hub import Commit  # here, because few need it

        commit = Commit(commit_message or "Upload config", commit_description, private, token, revision, create_pr)
        return self._files.push(self, repo_id, tags or (), commit)

    @field_validator("task_type", mode="before")
    @classmethod
    def _is_a_task(cls, value: object) -> object:
        if isinstance(value, str) and value not in list(TaskType):
            what = f"Invalid task type: '{value}'. Must be one of the following task types: {', '.join(TaskType)}."
            raise as_custom_error(rules.BAD_VALUE(what, fix=did_you_mean(value, list(TaskType)) or "Use one of them."))
        return value

    @field_validator("peft_type", mode="after")
    @classmethod
    def _of_this_class(cls, value: PeftType | None) -> PeftType | None:
        own: PeftType | None = cls.model_fields["peft_type"].default
        if own is not None and value not in (None, own):
            raise ValueError(f"should be `{own}`: a `{cls.__name__}` has no other type")
        return own if value is None else value

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read an adapter's config from a folder or the hub; its type decides the class, whatever class this is called on.

        Keywords of the hub's client are passed on, others ignored: the file's options count. Raises `ConfigError` when the
        file is missing, unreadable, or of an unknown type.
        """
        return cls._files.read(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """A config of the class that `peft_type` names, or of this class; unknown keywords are dropped with a warning.

        Raises `ConfigError` for an unknown type and for bad values.
        """
        return cls._files.of_keywords(cls, kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The options in a JSON file, as plain data. Raises `PeftcError` if it cannot be read."""
        return cls._files.options(path_json_file)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The options of a file as this class wants them; a subclass may change or refuse those of an older version."""
        return kwargs

    def contradictions(self) -> Iterable[Diagnostic]:
        """What is wrong with options that fit each by itself, where no model is needed to see it; for subclasses.

        Errors only, with the option as `where`: a config with one of them cannot be made.
        """
        return ()

    @model_validator(mode="after")
    def _has_no_contradictions(self) -> Self:
        found = [Problem((str(told.where.path),), told) for told in self.contradictions()]
        if found:
            raise as_validation_error(found)
        return self

    def revalidated(self) -> Self:
        """A validated copy: attributes may have been assigned since. Raises `ConfigError`."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields})


class PeftConfig(PeftConfigMixin):
    """What every adapter's config has. Raises `ConfigError` (also a `TypeError` and a `ValueError`) on bad values."""

    base_model_name_or_path: str | None = None
    """The base model that the adapter belongs to."""
    revision: str | None = None
    """The revision of the base model."""
    inference_mode: bool = False
    """Whether the adapter is frozen."""
