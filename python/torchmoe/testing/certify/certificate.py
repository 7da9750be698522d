"""The result of `certify`, as data and as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from torchmoe.testing.certify.law import ALL_OF_IT


@dataclass(frozen=True)
class Finding:
    """One way in which a law does not hold."""

    law: str
    """The name of the law."""
    clause: str
    """The part of the law, in a few words."""
    where: str
    """The tensor: "y", "aux_loss", "d/d NAME", a buffer's or an op's name."""
    expected: str
    """The expected value at the worst entry, or what must hold."""
    got: str
    """The value, or what was found instead."""
    meaning: str
    """One sentence on what this usually means."""
    num_tokens: int
    """The smallest number of tokens, of 1, 2, 3 and so on, at which it was found."""
    smallest_input: str
    """The call that gives these tokens, and their first elements."""


@dataclass(frozen=True)
class NotAsked:
    """A law, or a part of one, that was not tested."""

    law: str
    clause: str
    """The part, or "all of it"."""
    why: str
    could_be_asked: bool
    """Whether the law applies to the layer, so that it remains open without this test."""


@dataclass(frozen=True)
class Certificate:
    """The laws that hold for a layer, those that do not, and those that were not tested.

    As a condition it has the truth of `passed`.
    """

    layer: str
    """The name of its class."""
    laws: tuple[str, ...]
    """The laws that were to be tested, in order."""
    formulas: dict[str, str]
    """What each law says."""
    failures: tuple[Finding, ...]
    not_asked: tuple[NotAsked, ...]
    notes: tuple[str, ...]
    """Observations that break no law."""
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no law is broken, and none that could be tested was left out."""
        return not self.failures and not any(gap.could_be_asked for gap in self.not_asked)

    def __bool__(self) -> bool:
        return self.passed

    def held(self, law: str) -> str:
        """The result for a law.

        Returns:
            "held"; "broken"; "not asked", if no part of it was tested; or "in part", if a clause
            that could be tested was not.
        """
        if any(finding.law == law for finding in self.failures):
            return "broken"
        gaps = [gap for gap in self.not_asked if gap.law == law]
        if any(gap.clause == ALL_OF_IT for gap in gaps):
            return "not asked"
        return "in part" if any(gap.could_be_asked for gap in gaps) else "held"

    def __str__(self) -> str:
        """The table, for a terminal."""
        lines = [f"{self.layer}: {self._verdict()} ({self.seconds:.1f} s)", ""]
        width = max((len(law) for law in self.laws), default=0)
        lines += [
            f"  {self.held(law):<9}  {law:<{width}}  {self.formulas[law]}" for law in self.laws
        ]
        for finding in self.failures:
            lines += ["", f"{finding.law}: {finding.clause}, {finding.where}"]
            lines.append(f"  expected  {finding.expected}")
            lines.append(f"  got       {finding.got}")
            lines.append(f"  tokens    {finding.num_tokens}: {finding.smallest_input}")
            lines.append(f"  usually   {finding.meaning}")
        if self.not_asked:
            lines += ["", "not asked:"]
            lines += [f"  {gap.law}, {gap.clause}: {gap.why}" for gap in self.not_asked]
        if self.notes:
            lines += ["", "notes:", *(f"  {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The same as Markdown, for a report or a comment on a change."""
        lines = [f"### {self.layer}: {self._verdict()}", "", "| law | | formula |", "|---|---|---|"]
        lines += [
            f"| {law} | {self.held(law)} | {_cell(self.formulas[law])} |" for law in self.laws
        ]
        if self.failures:
            lines += ["", "| law | part | where | expected | got | tokens | usually means |"]
            lines.append("|---|---|---|---|---|---|---|")
        for finding in self.failures:
            cells = (
                finding.law,
                finding.clause,
                f"`{finding.where}`",
                finding.expected,
                finding.got,
                f"{finding.num_tokens}: `{finding.smallest_input}`",
                finding.meaning,
            )
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        if self.not_asked:
            lines += ["", "Not asked:", ""]
            lines += [f"- {gap.law}, {gap.clause}: {gap.why}" for gap in self.not_asked]
        if self.notes:
            lines += ["", "Notes:", "", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Every field and `passed`, as one JSON object."""
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2)

    def _verdict(self) -> str:
        if self.passed:
            return "passed"
        broken = {finding.law for finding in self.failures}
        if not broken:
            return "not passed: a law that could be asked was not"
        return f"not passed: {len(broken)} of {len(self.laws)} laws broken"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
