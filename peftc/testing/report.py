"""What the kit found: one `Finding` per check that failed, and a report that reads like a letter to the plugin's author."""

from __future__ import annotations

from dataclasses import dataclass

from peftc import rules
from peftc.diagnostics import Diagnostic, PeftcError


@dataclass(frozen=True)
class Finding:
    """A check that failed: its name, with which options on which model, and what was wrong.

    `promise` says what the check is for, `line` which line of the plugin raised, if one did.
    """

    check: str
    subject: str
    diagnostics: tuple[Diagnostic, ...]
    promise: str = ""
    line: str = ""

    def __str__(self) -> str:
        told = [str(diagnostic) for diagnostic in self.diagnostics]
        return "\n".join([*told, f"  line:  {self.line}"] if self.line else told)


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
        """One paragraph for each check that failed: on what it failed, and the first problem of each kind."""
        if not self.findings:
            return f"{self.peft_type} passes all {self.ran} conformance checks."
        head = f"{self.peft_type} fails {len(self.findings)} of {self.ran} conformance checks."
        return "\n\n".join([head, *map(self._paragraph, self.failed)])

    def _paragraph(self, check: str) -> str:
        findings = [finding for finding in self.findings if finding.check == check]
        kinds = {tuple((d.code, d.fix) for d in finding.diagnostics): finding for finding in reversed(findings)}
        subjects = [finding.subject for finding in findings]
        more = f" and {len(subjects) - 3} more" if len(subjects) > 3 else ""
        head = [f"{check}, on {', '.join(subjects[:3])}{more}", findings[0].promise]
        return "\n".join([*filter(None, head), *map(str, reversed(kinds.values()))])

    def require(self) -> Report:
        """Raise `PeftcError` with every finding, or return the report if there is none."""
        if self.findings:
            raise PeftcError(diagnostic for finding in self.findings for diagnostic in finding.diagnostics)
        return self


def broken(what: str, fix: str, where: str | None = None) -> PeftcError:
    """The error of a check that failed."""
    return PeftcError(rules.NOT_CONFORMANT(what, fix=fix, where=where))
