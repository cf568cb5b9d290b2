"""`adapter_config.json` in and out. The file's `peft_type` decides the class; nothing else in it decides what is run.

Files come from other libraries and other versions, so an unknown key is dropped with a warning that names it, while a
value that cannot be right is an error. What people write themselves is read strictly.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from peftc import rules
from peftc._version import FILE_VERSION
from peftc.config.base import CONFIG_NAME, ConfigFiles, PeftConfig, PeftConfigMixin
from peftc.config.json_text import parse_json
from peftc.config.places import Document, Location, json_path
from peftc.config.problems import ModelsAt, Problem, further, models_below, problems, shorten, unknown_keys
from peftc.config.reader import read_text
from peftc.diagnostics import ConfigError, Diagnostic, PeftcError, Where, did_you_mean, nearest, warn
from peftc.limits import MAX_JSON, MOST_TOLD
from peftc.registry import origin
from peftc.registry.boundary import boundary
from peftc.registry.manager import Registry, default_registry
from peftc.registry.shorthand import INIT, SAMPLES, Spelt, spelt
from peftc.registry.variants import variant_key
from peftc.tuner.variant import named_variant

if TYPE_CHECKING:
    from peftc.config.hub import Commit

#: A key that the reference once wrote and that describes a run, not an adapter.
_RUN_KEY = "runtime_config"


def config_from_keywords(cls: type[PeftConfigMixin], options: Mapping[str, Any]) -> PeftConfig:
    """The config that options describe, of the class that their type names, or else of `cls`.

    Unknown options are dropped with a warning. Raises `ConfigError`.
    """
    own = cls.model_fields["peft_type"].default
    if "peft_type" not in options and own is None:
        return PeftConfig(**options)
    config, told = config_from_dict({"peft_type": own, **options}, lenient=True)
    warn(_dropped_together(told))
    return config


def read_options(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The options in a JSON file as plain data, without those of a run. Raises `PeftcError`."""
    path = os.fspath(file)
    document = parse_json(read_text(path, MAX_JSON), path)
    if not isinstance(document.data, dict):
        what = f"`{path}` holds no object of options"
        fix = "Name the `adapter_config.json` of an adapter."
        raise ConfigError(rules.WRONG_DOCUMENT(what, fix=fix, where=Where(file=path)))
    document.data.pop(origin.PLUGIN_KEY, None)
    if document.data.pop(_RUN_KEY, None) is not None:
        warn([place(document, _run_key())])
    return document.data


def plugin_named(file: str | os.PathLike[str]) -> str | None:
    """The distribution and version that a config file says its method comes from. Raises `PeftcError`."""
    data = parse_json(read_text(os.fspath(file), MAX_JSON), os.fspath(file)).data
    return origin.named_in(data) if isinstance(data, dict) else None


def push_config(config: PeftConfigMixin, repository: str, tags: Iterable[str], commit: Commit) -> Any:
    """Upload a config's file; `tags` join those of the repository's card. Returns the hub's answer."""
    from peftc.config.hub import CARD, parse_card, upload  # here: its client costs more than all the rest

    def fill(folder: Path) -> None:
        write_config(config, folder)
        card = folder / CARD
        if not tags:
            card.unlink(missing_ok=True)  # what is not uploaded stays as it is
            return
        found = parse_card(card.read_text(encoding="utf-8") if card.exists() else "---\nlibrary_name: peft\n---\n")
        found.data["tags"] = list(dict.fromkeys([*(found.data.get("tags") or []), *tags]))
        card.write_text(str(found), encoding="utf-8")

    return upload(repository, fill, commit)


def read_config(source: str | os.PathLike[str], *, subfolder: str | None = None, **options: Any) -> PeftConfig:
    """The config of an adapter in a folder, in a file, or on the hub; unknown keys are warned of and dropped.

    `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` are passed on if the hub is asked, and
    ignored otherwise, as all other keywords are. Raises `PeftcError` when there is no such file, or it is not a config.
    """
    try:
        file = _find(os.fspath(source), subfolder, options)
        document = parse_json(read_text(file, MAX_JSON), file)
    except PeftcError as error:  # callers of the reference catch a `ValueError`
        raise ConfigError(error.diagnostics) from error
    config, warnings = config_from_document(document, lenient=True)
    warn(_dropped_together(warnings))
    return config


def _dropped_together(warnings: Sequence[Diagnostic]) -> Sequence[Diagnostic]:
    """The warnings, of keys that were dropped one for all: whoever loads an adapter did not write its file."""
    dropped = [warning for warning in warnings if warning.code == rules.DROPPED_KEY.code]
    if len(dropped) < 2:
        return warnings
    names = ", ".join(f"`{(warning.where.path or '').removeprefix('$.')}`" for warning in dropped)
    what = f"{len(dropped)} keys are not known and were dropped: {names}"
    fix = "If they matter to this adapter, use a version that has them; `peftc validate` tells each with its line."
    together = rules.DROPPED_KEY(what, fix=fix, where=Where(file=dropped[0].where.file))
    return [together, *(warning for warning in warnings if warning not in dropped)]


def write_config(
    config: PeftConfigMixin,
    folder: str | os.PathLike[str],
    auto_mapping_dict: Mapping[str, Any] | None = None,
    **ignored: Any,
) -> Path:
    """Write `adapter_config.json` as the reference does: all options, sorted, sets as sorted lists. Returns its path.

    The file is whole at every moment. Raises `ConfigError` for values that are not valid any more, `PeftcError` if the
    file cannot be written.
    """
    mapping = {} if auto_mapping_dict is None else {"auto_mapping": dict(auto_mapping_dict)}
    text = config_text(config.model_copy(update=mapping))
    file = Path(folder) / CONFIG_NAME
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        fix = "Name a folder that can be written, on a disk with space."
        what = f"`{file}` cannot be written: {error.strerror or error}"
        raise PeftcError(rules.CANNOT_WRITE(what, fix=fix, where=Where(file=str(file)))) from error
    return file


def config_text(config: PeftConfigMixin) -> str:
    """The text of `adapter_config.json`. Raises `ConfigError` for values that are not valid any more."""
    data = config.revalidated().to_json()
    data.pop(_RUN_KEY, None)
    data["peft_version"] = data["peft_version"] or FILE_VERSION
    plugin = origin.requirement_of(str(config.peft_type), default_registry(), named_variant(config))
    if plugin is not None:
        data[origin.PLUGIN_KEY] = plugin
    return json.dumps(data, indent=2, sort_keys=True)


def write_text(file: Path, text: str) -> None:
    """Replace the file's text in one step: another process, or a crash, sees the old text or the new. Raises `OSError`."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(handle)
        os.chmod(temporary, _mode_for(file))
        os.replace(temporary, file)
    except BaseException:  # also an interrupt: nothing half written may stay
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _mode_for(file: Path) -> int:
    """Permissions as an ordinary write would leave them; a temporary file has stricter ones."""
    try:
        return file.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def config_from_document(
    document: Document, *, lenient: bool, registry: Registry | None = None
) -> tuple[PeftConfig, list[Diagnostic]]:
    """The config in a document, and warnings, all with their lines. Raises `PeftcError` with every problem."""
    config, found = check_config(document.data, lenient=lenient, registry=registry)
    told = [*document.problems, *(place(document, problem) for problem in found)]
    if config is None or document.problems:
        raise ConfigError(told)
    return config, told


def config_from_dict(
    data: Mapping[str, Any], *, lenient: bool, where: Where | None = None, registry: Registry | None = None
) -> tuple[PeftConfig, list[Diagnostic]]:
    """The config that plain data describes, and warnings. Raises `ConfigError` with every problem.

    With `lenient` unknown keys are dropped with a warning; otherwise they are errors. `where` is what the data is from.
    """
    config, found = check_config(data, lenient=lenient, registry=registry)
    told = [_below(where or Where(), problem) for problem in found]
    if config is None:
        raise ConfigError(told)
    return config, told


def place(document: Document, problem: Problem, base: Location = ()) -> Diagnostic:
    """The problem with its line; `base` is where the data that it is about stands in the document."""
    return _moved(problem.diagnostic, document.where((*base, *problem.location), problem.on_key))


def check_config(
    data: Any, *, lenient: bool, registry: Registry | None = None
) -> tuple[PeftConfig | None, list[Problem]]:
    """The config, or None if there is an error among the problems."""
    registry = registry or default_registry()
    model = class_for(data, registry)
    if isinstance(model, Problem):
        return None, [model]
    warnings: list[Problem] = []
    plugin = origin.named_in(data)
    if lenient:
        told = _version_told(data, registry)
        data = model.check_kwargs(**{key: value for key, value in data.items() if key != origin.PLUGIN_KEY})
        shorthand = of_shorthand(data, registry)
        data, warnings = _without_unknown(model, data if shorthand is None else shorthand.options)
        warnings += told
    elif stray := not_stored(model, data):
        return None, stray
    else:
        shorthand = of_shorthand(data, registry)
    if shorthand is not None:
        config, found = from_shorthand(model, replace(shorthand, options=data if lenient else shorthand.options))
        if shorthand.samples is not None:
            found.append(_of_a_training())
        absent = [] if config is None else _variant_missing(config, plugin, registry)
        return None if absent or found else config, [*warnings, *found, *absent]
    try:
        config = validated(model, data)
        absent = _variant_missing(config, plugin, registry)
        return None if absent else config, [*warnings, *absent]
    except PeftcError as error:
        return None, [*warnings, *(Problem((), told) for told in error.diagnostics)]
    except ValidationError as error:
        return None, [*warnings, *problems(error, data, models_below(model))]


def valid_config(data: Any, registry: Registry) -> PeftConfig | None:
    """The config if nothing is wrong with it, without a word on what is."""
    model = class_for(data, registry)
    if isinstance(model, Problem) or not_stored(model, data):
        return None
    shorthand = of_shorthand(data, registry)
    if shorthand is not None:
        return from_shorthand(model, shorthand)[0]
    try:
        return validated(model, data)
    except (ValidationError, PeftcError):
        return None


def validated(model: type[PeftConfig], data: Mapping[str, Any]) -> PeftConfig:
    """The config of plain data. Raises `ValidationError` for wrong options, and `PeftcError` if the class itself fails."""
    with boundary(str(model.model_fields["peft_type"].default), "options"):
        try:
            config: PeftConfig = model.__pydantic_validator__.validate_python(dict(data))
        except ValidationError as error:
            wrong = error  # not a failure of the plugin
        else:
            return config
    raise wrong


def of_shorthand(data: Any, registry: Registry) -> Spelt | None:
    """The shorthand of a start in an adapter's options spelt out; None where there is none."""
    if not isinstance(data, Mapping) or INIT not in data or isinstance(class_for(data, registry), Problem):
        return None
    return spelt(data, registry.get(data["peft_type"]))


def from_shorthand(model: type[PeftConfig], shorthand: Spelt) -> tuple[PeftConfig | None, list[Problem]]:
    """The config of options that had a shorthand, or None and all that is wrong, at the places where it is said."""
    found = list(shorthand.found)
    try:
        config = validated(model, shorthand.options)
    except PeftcError as error:
        return None, [*found, *(Problem((), told) for told in error.diagnostics)]
    except ValidationError as error:
        wrong = problems(error, shorthand.options, models_below(model))
        return None, [*found, *(replace(problem, location=shorthand.place(problem.location)) for problem in wrong)]
    return None if found else config, found


def _of_a_training() -> Problem:
    what = f"`{SAMPLES}` describes a training, which an adapter's config has none of"
    fix = "Write a spec with a `train` section, or remove it."
    return Problem((INIT, SAMPLES), rules.UNKNOWN_KEY(what, fix=fix), on_key=True)


def class_for(data: Any, registry: Registry) -> type[PeftConfig] | Problem:
    """The class that `peft_type` names, or why there is none."""
    if not isinstance(data, Mapping):
        what = f"A config is an object of options, not `{shorten(data)}`"
        return Problem((), rules.WRONG_DOCUMENT(what, fix="Give `peft_type` and the options of that method."))
    if "peft_type" not in data:
        close = [f"`{key}` may be meant for it." for key in nearest("peft_type", data, limit=1)]
        fix = " ".join([f"Add it, one of {', '.join(registry.names)}.", *close])
        return Problem((), rules.MISSING_KEY("`peft_type` is missing", fix=fix))
    name = data["peft_type"]
    if not isinstance(name, str):
        what = f"`peft_type` cannot be `{shorten(name)}`: should be a valid string"
        return Problem(("peft_type",), rules.BAD_VALUE(what, fix=f"Use one of {', '.join(registry.names)}."))
    try:
        return registry.get(name).config
    except PeftcError as error:
        found, plugin = error.diagnostics[0], origin.named_in(data)
        if found.code == rules.UNKNOWN_TYPE.code and plugin is not None:
            found = origin.missing(name, plugin)
        return Problem(("peft_type",), found)


def _variant_missing(config: PeftConfig, plugin: str | None, registry: Registry) -> list[Problem]:
    """That the variant of a file comes from a package that is not there, if the file says which; others are told when the
    config is compiled."""
    name = named_variant(config)
    key = variant_key(str(config.peft_type), name)
    if not name or plugin is None or key in registry.variants.names:
        return []
    return [Problem(("variant",), origin.missing(name, plugin, f"variant of {config.peft_type}"))]


def _version_told(data: Mapping[str, Any], registry: Registry) -> list[Problem]:
    """A warning if the file's plugin is a later one than is installed."""
    plugin = origin.named_in(data)
    variant = data.get("variant")
    variant = variant if isinstance(variant, str) else ""
    found = None if plugin is None else origin.outdated(data["peft_type"], plugin, registry, variant)
    return [] if found is None else [Problem((origin.PLUGIN_KEY,), found)]


def not_stored(model: type[PeftConfig], data: Mapping[str, Any]) -> list[Problem]:
    """Keys that an adapter's file does not have, although the class takes them as keywords in Python."""
    fix = "Pass it in Python, where the model is made."
    return [
        Problem((key,), rules.UNKNOWN_KEY(f"`{key}` describes a run and cannot stand in a file", fix=fix), True)
        for key in data
        if key in model.model_fields and model.model_fields[key].exclude
    ]


def _without_unknown(model: type[PeftConfig], data: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Problem]]:
    """The data without keys that the class has not, at any depth, and a warning for each."""
    kept: dict[str, Any] = {key: value for key, value in data.items() if key != _RUN_KEY}
    warnings = [_run_key()] if data.get(_RUN_KEY) is not None else []
    try:
        validated(model, kept)
    except PeftcError:
        pass  # told when the options are read in earnest
    except ValidationError as error:
        models_at = models_below(model)
        unknown = unknown_keys(error, kept)
        if unknown:
            kept = copy.deepcopy(kept)
        warnings += [_dropped(location, models_at) for location in unknown[:MOST_TOLD]]
        warnings += [Problem((), further(len(unknown) - MOST_TOLD, warning=True))] if len(unknown) > MOST_TOLD else []
        for location in unknown:
            holder: Any = kept
            for part in location[:-1]:
                holder = holder[part]
            del holder[location[-1]]
    return kept, warnings


def _run_key() -> Problem:
    what = f"`{_RUN_KEY}` describes a run, not an adapter, and was dropped"
    return Problem((_RUN_KEY,), rules.DROPPED_KEY(what, fix="Pass it where the model is loaded."), True)


def _dropped(location: Location, models_at: ModelsAt) -> Problem:
    name = str(location[-1])
    options = [option for model in models_at(location[:-1]) for option in model.model_fields]
    hint = did_you_mean(name, options)
    fix = f"{hint} If it matters to this adapter, use a version that has it; otherwise remove it.".strip()
    return Problem(
        location, rules.DROPPED_KEY(f"`{json_path(location, root='')}` is not known and was dropped", fix=fix), True
    )


def _below(where: Where, problem: Problem) -> Diagnostic:
    path = json_path(problem.location, root=where.path or "") or None
    return _moved(problem.diagnostic, Where(where.file, where.line, where.column, path))


def _moved(diagnostic: Diagnostic, where: Where) -> Diagnostic:
    return replace(diagnostic, where=where)


def _find(source: str, subfolder: str | None, options: Mapping[str, Any]) -> str:
    """The path of the config file; the hub is asked only for what is no path here."""
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # a name too long, a folder that may not be looked into
        what = f"`{source[:200]}` cannot be read: {error.strerror or error}"
        raise PeftcError(rules.UNREADABLE(what, fix="Check the path and its permissions.")) from error
    if is_file:
        return source
    if is_folder:
        return str(path / (subfolder or "") / CONFIG_NAME)
    from peftc.config.hub import fetch, is_repository  # here: its client costs more than all the rest

    if is_repository(source):
        return str(fetch(source, CONFIG_NAME, subfolder, options))
    fix = did_you_mean(path.name, _folders_beside(path)) or "Check the path."
    raise PeftcError(rules.UNREADABLE(f"There is no folder `{source}`", fix=fix, where=Where(file=source)))


def _folders_beside(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir()][:1000]
    except OSError:
        return []


PeftConfigMixin._files = ConfigFiles(read_config, write_config, push_config, read_options, config_from_keywords)
