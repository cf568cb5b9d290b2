"""What a method declares that it cannot adapt: ranks beyond a layer, and convolutions of several groups.

A method says it in one line, and the core tells it alike for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from peftc import rules
from peftc.config.base import PeftConfig
from peftc.diagnostics import Diagnostic, Severity
from peftc.graph.nodes import LayerFacts


@dataclass(frozen=True, slots=True)
class RankLimit:
    """How large an option may be on a layer: the rank, or what stands for it."""

    #: the option that is limited
    option: str = "r"
    #: its largest value by the layer's facts; left out, the largest rank that the layer's weight can have
    most: Callable[[LayerFacts], int] = attrgetter("rank")
    #: whether more than that cannot be, which is an error; else it does nothing, which is warned of
    is_hard: bool = False

    def problems(self, c: PeftConfig, layer: LayerFacts, path: str) -> Iterator[Diagnostic]:
        """The one problem of a layer that has less room than the option says."""
        value, most = getattr(c, self.option), self.most(layer)
        if value <= most:
            return
        pattern = next((name for name, option in c.pattern_options.items() if option == self.option), "")
        own = f", or `{pattern}` for it," if pattern else ""
        yield rules.RANK_BEYOND_LAYER(
            f"`{self.option}: {value}` is beyond what `{path}` can have ({most})",
            fix=f"Set `{self.option}`{own} to at most {most}.",
            where=path,
            severity=Severity.ERROR if self.is_hard else None,
        )


def grouped(layer: LayerFacts, path: str) -> Diagnostic:
    """The problem of a convolution of several groups, where the mathematics is not of such."""
    return rules.BAD_TARGET(
        f"`{path}` is a convolution of {layer.groups} groups",
        why="The method's mathematics is of layers whose every output is computed from all inputs.",
        fix="Leave it out, or exclude it with `exclude_modules`.",
        where=path,
    )
