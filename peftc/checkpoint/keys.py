"""Keys of a checkpoint as records of segments: finding a planned key under the names that wrappers give it, and listing keys.

A key is taken apart at its dots once; wrappers are whole segments at known positions. Nothing is searched or replaced in
text, so a module called `module` or an adapter called `weight` is never mistaken for something else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from itertools import groupby

from peftc import rules
from peftc.compiler.match import Deadline, Pattern
from peftc.diagnostics import PeftcError

#: Segments that torch puts around a module: compiled, sharded, recomputed.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: The segment that data parallelism puts before everything.
PARALLEL = "module"

Segments = tuple[str, ...]


def unwrapped(key: str, root: str) -> Segments:
    """The segments of a key without wrappers and without the root (`base_model.model.`): what the module itself is called."""
    segments = tuple(part for part in key.split(".") if part not in WRAPPERS)
    start = tuple(root.rstrip(".").split(".")) if root else ()
    if segments[:1] == (PARALLEL,) and segments[1 : 1 + len(start)] == start:
        segments = segments[1:]
    return segments[len(start) :] if start and segments[: len(start)] == start else segments


def assign(wanted: Collection[str], found: Iterable[str], root: str) -> dict[str, str]:
    """Wanted key -> key in the file: the same text, or else the same module under wrappers or without the root.

    A name that could be two things is left alone; the caller then reports both sides.
    """
    present = dict.fromkeys(found)
    sources = {key: key for key in wanted if key in present}
    places = _unique((unwrapped(key, root), key) for key in wanted if key not in sources)
    if places:
        offers = _unique((unwrapped(key, root), key) for key in present if key not in sources)
        for name, key in places.items():
            source = offers.get(name) or offers.get((PARALLEL, *name))
            if source is not None:
                sources[key] = source
    return sources


def _unique(pairs: Iterable[tuple[Segments, str]]) -> dict[Segments, str]:
    found: dict[Segments, str] = {}
    twice = set()
    for name, key in pairs:
        if name in found:
            twice.add(name)
        found[name] = key
    return {name: key for name, key in found.items() if name not in twice}


#: What may stand before a module's path in a checkpoint, the longest first.
_ROOTS = ("base_model.model.", "base_model.")


def renamed(keys: Iterable[str], key_mapping: Mapping[str, str]) -> dict[str, str]:
    """New key -> key, by regular expressions and their replacements.

    As in the reference, they see a key without `base_model.model.` (or `base_model.`), and only the first that occurs in
    it applies. Raises `PeftcError` for an expression that is none or takes too long, and for two keys that become one.
    """
    deadline = Deadline()
    patterns = [(Pattern(text, deadline, "key_mapping"), replacement) for text, replacement in key_mapping.items()]
    found: dict[str, str] = {}
    for key in keys:
        new = _mapped(key, patterns)
        if new in found:
            what = f"`key_mapping` makes `{new}` of both `{found[new]}` and `{key}`"
            fix = "Let each expression match one kind of key, e.g. with `^` and `$`."
            raise PeftcError(rules.KEYS_COLLIDE(what, fix=fix, where="key_mapping"))
        found[new] = key
    return found


def _mapped(key: str, patterns: Iterable[tuple[Pattern, str]]) -> str:
    root = next((root for root in _ROOTS if key.startswith(root)), "")
    name = key.removeprefix(root)
    for pattern, replacement in patterns:
        changed, times = pattern.replaced(replacement, name)
        if times:
            return root + changed
    return key


class Nearest:
    """Finds the candidate that a key most likely stands for: most segments in common from the end, then from the start."""

    def __init__(self, candidates: Iterable[str]) -> None:
        self._by_end: dict[Segments, list[Segments]] = {}
        for candidate in candidates:
            segments = tuple(candidate.split("."))
            for length in range(1, len(segments) + 1):
                self._by_end.setdefault(segments[-length:], []).append(segments)

    def __call__(self, key: str) -> str | None:
        """The nearest candidate, or None if none ends like it."""
        segments = tuple(key.split("."))
        for length in range(len(segments), 0, -1):
            alike = self._by_end.get(segments[-length:])
            if alike:
                return ".".join(max(alike, key=partial(_common, segments)))
        return None


def _common(one: Segments, other: Segments) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def grouped(keys: Iterable[str]) -> dict[str, int]:
    """Keys that differ in one block number as one: `layers.{0..29}.q.weight` -> 30. No key is left out."""
    families: dict[tuple[str, str, str], list[int]] = {}
    for key in keys:
        before, number, after = _around_number(key)
        families.setdefault((before, number and "{}", after), []).append(int(number or 0))
    return {
        before + (_ranges(numbers) if braces else "") + after: len(numbers)
        for (before, braces, after), numbers in families.items()
    }


def one_of_each(keys: Iterable[str]) -> list[str]:
    """The first key of each group that `grouped` makes."""
    first: dict[tuple[str, str], str] = {}
    for key in keys:
        before, _, after = _around_number(key)
        first.setdefault((before, after), key)
    return list(first.values())


def _around_number(key: str) -> tuple[str, str, str]:
    """A key around its first segment that is a plain number; the number is empty if there is none."""
    segments = key.split(".")
    for position, part in enumerate(segments):
        if part.isascii() and part.isdigit() and len(part) < 10 and str(int(part)) == part:
            before = "".join(f"{name}." for name in segments[:position])
            after = "".join(f".{name}" for name in segments[position + 1 :])
            return before, part, after
    return key, "", ""


def _ranges(numbers: Iterable[int]) -> str:
    """`3` for one number, `{0..3,7}` for several."""
    ordered = sorted(set(numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return texts[0] if len(ordered) == 1 else "{" + ",".join(texts) + "}"


def listed(keys: Iterable[str], limit: int = 20) -> str:
    """Keys as one line of text, repeated layers grouped; beyond `limit` groups, how many keys are not shown."""
    groups = grouped(keys)
    texts = [f"`{text}` ×{count}" if count > 1 else f"`{text}`" for text, count in groups.items()]
    rest = sum(list(groups.values())[limit:])
    return ", ".join(texts[:limit]) + (f" and {rest} more" if rest else "")


def common_change(pairs: Mapping[str, str]) -> tuple[str, str] | None:
    """If every key of `pairs` becomes its value by exchanging one leading part, that part: `("model", "model.text")`."""
    changes = set()
    for before, after in pairs.items():
        one, other = before.split("."), after.split(".")
        while one and other and one[-1] == other[-1]:
            one.pop()
            other.pop()
        changes.add((".".join(one), ".".join(other)))
    return changes.pop() if len(changes) == 1 else None
