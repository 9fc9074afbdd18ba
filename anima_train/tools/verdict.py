"""The findings about a file: its kind, and which of its keys each program would use."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from anima_train.core.format import count

PROGRAMS = ("ComfyUI", "diffusers")


@dataclass(frozen=True)
class Reading:
    """The keys of a file that one program uses."""

    num_used: int = 0  # keys
    ignored: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> keys
    refusal: str | None = None  # why it takes nothing of the file at all

    @classmethod
    def of(cls, reasons: Iterable[tuple[str, str | None]], refusal: str | None = None) -> "Reading":
        """Return the reading of keys by the reason why each is ignored; None: it is used."""
        ignored: dict[str, list[str]] = defaultdict(list)
        num_used = 0
        for key, reason in reasons:
            if reason is None:
                num_used += 1
            else:
                ignored[reason].append(key)
        return cls(0 if refusal else num_used, dict(ignored), refusal)


@dataclass(frozen=True)
class Verdict:
    """The findings of `anima verify`."""

    path: str
    kind: str
    facts: Mapping[str, str]  # name -> text, in the order in which they are told
    programs: Mapping[str, Reading]  # of `PROGRAMS`
    problems: Sequence[str] = ()  # that no program would tell: missing halves or tensors, shapes that do not fit
    notes: Sequence[str] = ()

    def is_good_for(self, program: str) -> bool:
        """Return True if the file is whole, and the program uses all of it."""
        return not self.complaints(program)

    def complaints(self, program: str) -> list[str]:
        """Return why a file is not whole, or not all of it would be used by a program; nothing if it is."""
        reading = self.programs[program]
        refusals = [] if reading.refusal is None else [f"{program} refuses it: {reading.refusal}"]
        ignored = [
            f"{program} ignores {count(len(keys), 'key')}, such as {keys[0]}: {reason}"
            for reason, keys in reading.ignored.items()
        ]
        return [*self.problems, *refusals, *ignored]


def lines(verdict: Verdict, num_shown: int = 10) -> Iterator[str]:
    """Yield a verdict for people.

    Args:
        verdict: what was found.
        num_shown: keys to name of those that are ignored for one reason.
    """
    yield f"{verdict.path}: {verdict.kind}"
    width = max((len(name) for name in (*verdict.facts, *verdict.programs)), default=0)
    for name, text in verdict.facts.items():
        yield f"  {name:<{width}}  {text}"
    for program, reading in verdict.programs.items():
        yield f"  {program:<{width}}  {told(reading)}"
    for problem in verdict.problems:
        yield f"problem: {problem}"
    for program, reading in verdict.programs.items():
        for reason, keys in reading.ignored.items():
            yield f"{program} ignores {count(len(keys), 'key')}: {reason}"
            yield from (f"  {key}" for key in keys[:num_shown])
            if len(keys) > num_shown:
                yield f"  ... and {len(keys) - num_shown:,} more (`--json` has all)"
    for note in verdict.notes:
        yield f"note: {note}"


def told(reading: Reading) -> str:
    """Return what a program does with a file in a few words."""
    if reading.refusal is not None:
        return f"refuses it: {reading.refusal}"
    num_ignored = sum(len(keys) for keys in reading.ignored.values())
    if not num_ignored:
        return f"uses all {count(reading.num_used, 'key')}"
    return f"uses {reading.num_used:,} of {count(reading.num_used + num_ignored, 'key')}"
