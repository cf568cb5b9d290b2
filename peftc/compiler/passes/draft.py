"""What the passes hand to each other: a `Draft` of one adapter's plan, and the `Context` that stays the same.

Both are frozen; a pass returns a new draft. What a pass did is the difference of two drafts, which is how a plan explains
itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peftc.compiler.passes.former_targets import FormerTarget
from peftc.compiler.plan.rewrite import Rewrite
from peftc.compiler.plan.sites import CallSite, MapSite, ModuleSite, PromptSite, SaveSite, TrainSite
from peftc.config.base import PeftConfig
from peftc.config.places import json_path
from peftc.diagnostics import Diagnostic, PeftcError, Severity, Where
from peftc.graph.nodes import ModuleGraph
from peftc.tuner.method import TunerMethod

#: Where targets come from that no option names: a table or the method, or the roles that a table's entries have.
DEFAULT = "default"
BY_ROLE = "by role"


@dataclass(frozen=True)
class Options:
    """How to compile: see `peftc.compiler.compile.compile_plan`."""

    strict: bool = False
    allow_dead: frozenset[str] = frozenset()
    autocast_adapter_dtype: bool = True
    task_heads: bool = True
    given: frozenset[str] | None = None
    loading: bool = False


@dataclass(frozen=True)
class Context:
    """What stays the same for all passes: the model, the method, the adapter's name, and how to compile."""

    graph: ModuleGraph
    method: TunerMethod
    name: str
    options: Options = Options()

    def where(self, option: str, entry: str | None = None) -> str:
        """The JSON path of an option of this adapter in a spec, or of an entry of a list or mapping there, by its text."""
        return json_path(("adapters", self.name, option, *(() if entry is None else (entry,))))

    @property
    def dead(self) -> Severity:
        """How bad an entry without effect is."""
        return Severity.ERROR if self.options.strict else Severity.WARNING


@dataclass(frozen=True)
class Draft:
    """One adapter so far.

    `targets` are the modules that are meant, in graph order, each with the entries that mean it, the most exact first;
    `dropped` those that were meant but are left alone, and why. `source` says where the entries come from, and `notes`
    what was decided that no option says.
    `parameters` are single parameters that are meant, by module and name, with their entries.
    `former` are parameters that targets mean by the names of what those were, by path; `rewrites` what was made of them.
    `tied` are modules that get the adapter of another one, whose weight they have, by path.
    `rows` are sites of rows that train beside what the method does.
    `overrides` has the pattern keys in force per module, or parameter, as `(pattern option, key)`.
    """

    config: PeftConfig
    source: str = "target_modules"
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    overrides: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    parameters: Mapping[tuple[str, str], str] = field(default_factory=dict)
    former: Mapping[str, FormerTarget] = field(default_factory=dict)
    rewrites: tuple[Rewrite, ...] = ()
    maps: tuple[MapSite, ...] = ()
    rows: tuple[MapSite, ...] = ()
    saves: tuple[SaveSite, ...] = ()
    trains: tuple[TrainSite, ...] = ()
    prompt: PromptSite | None = None
    modules: tuple[ModuleSite, ...] = ()
    call: CallSite | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[Diagnostic, ...] = ()

    def but(self, **changes: Any) -> Draft:
        """The draft with some fields replaced."""
        return replace(self, **changes)

    def configured(self, **options: Any) -> Draft:
        """The draft with some options resolved. Values are trusted: they were checked or come from the compiler."""
        return replace(self, config=self.config.model_copy(update=options))

    def told(self, *problems: Diagnostic) -> Draft:
        """The draft with diagnostics added."""
        return replace(self, problems=self.problems + problems) if problems else self

    def failed(self, error: PeftcError) -> Draft:
        """The draft with the diagnostics of an error added."""
        return self.told(*error.diagnostics)

    def without(self, dropped: Mapping[str, str]) -> Draft:
        """The draft with some targets left alone, for the reasons given."""
        if not dropped:
            return self
        kept = {path: entries for path, entries in self.targets.items() if path not in dropped}
        return replace(self, targets=kept, dropped={**self.dropped, **dropped})


def placed(problem: Diagnostic, adapter: str, config: PeftConfig) -> Diagnostic:
    """A method's word on an option of an adapter, with the option's place in a spec."""
    name = problem.where.path
    if name is None or name not in type(config).model_fields:
        return problem
    return replace(problem, where=Where(path=json_path(("adapters", adapter, name))))


def option(config: PeftConfig, name: str) -> Any:
    """The value of an option that not every method has; None for those without it."""
    return getattr(config, name) if name in type(config).model_fields else None


def listed(items: Iterable[str], limit: int = 3) -> str:
    """Some names for a sentence: the first few in backticks, and how many more.

    >>> listed(["a", "b", "c", "d", "e"])
    '`a`, `b`, `c` and 2 more'
    """
    names = list(items)
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return f"{shown} and {len(names) - limit:,} more" if len(names) > limit else shown
