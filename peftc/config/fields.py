"""Configs as `dataclasses` sees them: the reference's are dataclasses, and programs copy, show and parse them as such.

Fields are made when somebody asks for them, so that no config costs more to import or to make.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache, partial
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from peftc.config.docs import describe


class OfDataclass:
    """An attribute by which `dataclasses` and `pprint` know their own, for a class of options."""

    def __set_name__(self, owner: type[BaseModel], name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type[BaseModel]) -> Any:
        return getattr(_made(owner), self._name)


@cache
def _made(owner: type[BaseModel]) -> type:
    """A dataclass with every option as a field, with its type, default and help, and nothing else."""
    options = [(name, info.annotation or Any, _field(owner, name, info)) for name, info in owner.model_fields.items()]
    return dataclasses.make_dataclass(owner.__name__, options)


def _field(owner: type[BaseModel], name: str, info: FieldInfo) -> Any:
    made = partial(dataclasses.field, metadata={"help": describe(owner, name)}, kw_only=True)
    if info.is_required():
        return made()
    if info.default_factory is not None:
        return made(default_factory=info.default_factory)
    if type(info.default).__hash__ is None:
        return made(default_factory=partial(copy.deepcopy, info.default))
    return made(default=info.default)
