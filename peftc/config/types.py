"""The two vocabularies of a config: PEFT types, which are open (whatever is installed), and task types, which are fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from peftc.diagnostics import did_you_mean


class _OpenEnum(type):
    """What users of an enum expect of its class: members by attribute and by key, iteration, membership.

    The members are the types that can be asked for when the class is asked, so that a plugin that is registered is one.
    """

    #: names of the types that can be asked for: the registry puts its own here
    known: Callable[[], Iterable[str]]

    @property
    def __members__(cls) -> Mapping[str, Any]:
        return MappingProxyType({name: cls(name) for name in cls.known()})

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):  # Python and pydantic ask for such names, which are no types
            raise AttributeError(f"`{cls.__name__}` has no attribute `{name}`", name=name, obj=cls)
        member = cls.__members__.get(name)
        if member is None:
            hint = did_you_mean(name, cls.__members__)
            raise AttributeError(f"No installed method has the type `{name}`. {hint}".rstrip(), name=name, obj=cls)
        return member

    def __getitem__(cls, name: str) -> Any:
        return cls.__members__[name]

    def __iter__(cls) -> Iterator[Any]:
        return iter(cls.__members__.values())

    def __bool__(cls) -> bool:
        return True  # or a class without members would be false

    def __len__(cls) -> int:
        return len(cls.__members__)

    def __contains__(cls, name: object) -> bool:
        return name in cls.__members__


class PeftType(str, metaclass=_OpenEnum):
    """The name of a method. A string, with the `value` and `name` that users of an enum expect.

    There is no list of members: the types that exist are the plugins that are installed. `PeftType.NAME`, `list(PeftType)`
    and `"NAME" in PeftType` ask for them; `PeftType("NAME")` takes any name.
    """

    __slots__ = ()

    @property
    def value(self) -> str:
        """The type as a plain text."""
        return str(self)

    @property
    def name(self) -> str:
        """The same."""
        return str(self)

    def __repr__(self) -> str:
        return f"PeftType({str(self)!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema(), serialization=core_schema.to_string_ser_schema()
        )


class TaskType(StrEnum):
    """What the adapted model is for; decides the model class and which head is trained along."""

    SEQ_CLS = "SEQ_CLS"  # classify a text
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"  # write a text from a text, with an encoder and a decoder
    CAUSAL_LM = "CAUSAL_LM"  # write on from a text
    TOKEN_CLS = "TOKEN_CLS"  # classify each token
    QUESTION_ANS = "QUESTION_ANS"  # mark an answer in a text
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"  # give hidden states
