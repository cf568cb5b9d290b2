"""What the kit found: one `Finding` per check that failed, and a report that reads like a letter to the plugin's author."""

from __future__ import annotations

from dataclasses import dataclass

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError


@dataclass(frozen=True)
class Finding:
    """A check that failed: its name, with which options on which model, and what was wrong."""

    check: str
    subject: str
    diagnostics: tuple[Diagnostic, ...]

    def __str__(self) -> str:
        told = "\n".join(str(diagnostic) for diagnostic in self.diagnostics)
        return f"{self.check}, {self.subject}\n{told}"


@dataclass(frozen=True)
class Report:
    """All checks of one method: how many ran, and what they found."""

    peft_type: str
    ran: int
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed, each once."""
        return tuple(dict.fromkeys(finding.check for finding in self.findings))

    def __str__(self) -> str:
        if not self.findings:
            return f"{self.peft_type} passes all {self.ran} conformance checks."
        head = (
            f"{self.peft_type} fails {len(self.findings)} of {self.ran} conformance checks: {', '.join(self.failed)}."
        )
        return "\n\n".join([head, *map(str, self.findings)])

    def require(self) -> Report:
        """Raise `PeftcError` with every finding, or return the report if there is none."""
        if self.findings:
            raise PeftcError(diagnostic for finding in self.findings for diagnostic in finding.diagnostics)
        return self


def broken(what: str, fix: str, where: str | None = None) -> PeftcError:
    """The error of a check that failed."""
    return PeftcError(rules.NOT_CONFORMANT(what, fix=fix, where=where))
