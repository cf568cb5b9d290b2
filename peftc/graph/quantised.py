"""Whether and how a located base is quantised: by its own files, or as it is asked to be; told before anything is built.

Above the torch line: what its config says is plain data, and packages are looked for and not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftc import rules
from peftc.config.problems import shorten
from peftc.config.quantize import BITSANDBYTES, LIBRARIES, METHOD, method_of, missing_of, problems_of_config
from peftc.diagnostics import PeftcError, Where
from peftc.graph.locate import LocatedBase


def packed_config(base: LocatedBase) -> Mapping[str, Any] | None:
    """The `quantization_config` of the base's own files, whose weights are packed; None for ordinary ones.

    That of a multimodal model may stand in the part for text.
    """
    config = base.config or {}
    text = config.get("text_config")
    own = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, Mapping) else None)
    return own if isinstance(own, Mapping) else None


def quantization_of(base: LocatedBase) -> Mapping[str, Any] | None:
    """How the weights are packed once they are loaded, in transformers' words; None for a base with ordinary layers.

    Raises `PeftcError` if what is asked for does not go with what the base is, makes no sense, or needs a package that is not
    installed.
    """
    own, asked = packed_config(base), base.ref.quantization
    where = Where(file=base.ref.name)
    if asked is not None and base.gguf is not None:
        what = "A GGUF file is quantised as it is, and unpacked when it is loaded"
        fix = "Name a folder or a repository with the model's weights, or ask for no quantisation."
        raise PeftcError(rules.CONTRADICTION(what, fix=fix, where=where))
    if own is None and asked is None:
        return None
    if own is not None and asked is not None:
        _require_agreement(base, own, asked)
    config = own or asked or {}
    found = [] if own is not None else list(problems_of_config(config))  # transformers knows what it wrote
    if found:
        raise PeftcError(replace(problem.diagnostic, where=where) for problem in found)
    absent = missing_of(str(method_of(config)))
    if absent is not None:
        raise PeftcError(replace(absent, where=where))
    return config


def _require_agreement(base: LocatedBase, own: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Options of loading may be given to some that are packed; nothing can be quantised twice."""
    method, wanted = method_of(own), method_of(asked)
    library = LIBRARIES.get(method) if isinstance(method, str) else None
    if method == wanted and ((library is not None and library.loads_with) or _same(own, asked)):
        return
    what = f"The base is quantised already, by `{shorten(method)}`, and is to be by `{shorten(wanted)}`"
    if method == wanted:
        what = f"The base is quantised already by `{shorten(method)}`, with other options"
    fix = "Leave the quantisation out of the spec, or name the model that it was made from."
    raise PeftcError(rules.CONTRADICTION(what, fix=fix, where=Where(file=base.ref.name)))


def _same(own: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether files have what is asked for; options that it does not name are theirs."""
    return all(own.get(key, value) == value for key, value in asked.items() if key != METHOD)


def distributions_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What has to be of the same release for a base to be packed the same way."""
    library = LIBRARIES.get(str(method_of(config)))
    return () if library is None else tuple(name.partition("[")[0] for name in library.modules.values())


#: Libraries that pack the same way on every machine, so that a graph may be kept.
STEADY = frozenset({BITSANDBYTES, "torchao", "quanto"})
