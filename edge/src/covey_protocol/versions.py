"""Comparing versions, and what a wheel asks of its surroundings: the part of Python's packaging rules that covey needs.

Only the numbers at the front of a version count: 2.1.0.post1 is taken for 2.1.0, 1.0rc1 for 1.0. Of environment markers
only python_version is known. What is not known raises UsageError naming it and is never guessed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

from covey_protocol.errors import UsageError

Version = tuple[int, ...]
_FRONT = re.compile(r"\s*(?:\d+!)?v?(\d{1,9}(?:\.\d{1,9})*)")
_ONE = re.compile(r"\s*(~=|==|!=|<=|>=|<|>)\s*([^\s,;()]+)\s*")
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?")
_MARKER = re.compile(r"\s*python_version\s*(<=|>=|==|!=|<|>)\s*['\"]([0-9.]+)['\"]\s*")
_COMPARISONS: dict[str, Callable[[Version, Version], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def version_of(text: str) -> Version:
    """The numbers of a version without zeros at the end: 1.20.0 equals 1.20."""
    front = _FRONT.match(text)
    if front is None:
        raise UsageError(f"{text[:40]!r} is no version")
    numbers = [int(number) for number in front[1].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def fits(version: str, specifier: str) -> bool:
    """Whether a version satisfies `>=1.22,<2`; anything satisfies "". UsageError for what is no specifier."""
    return all(_fits_one(version, one) for one in specifier.split(",") if one.strip())


def _fits_one(version: str, one: str) -> bool:
    parts = _ONE.fullmatch(one)
    if parts is None:
        raise UsageError(f"{one.strip()[:40]!r} is no version specifier")
    comparison, wanted = parts[1], parts[2]
    if wanted.endswith(".*") and comparison in ("==", "!="):
        return _begins(version, wanted[:-2]) is (comparison == "==")
    if comparison == "~=":
        return version_of(version) >= version_of(wanted) and _begins(version, wanted.rpartition(".")[0])
    return _COMPARISONS[comparison](version_of(version), version_of(wanted))


def _begins(version: str, prefix: str) -> bool:
    front, wanted = _FRONT.match(version), _FRONT.match(prefix)
    if front is None or wanted is None:
        raise UsageError(f"{prefix[:40]!r} is no version")
    numbers, start = ([int(number) for number in match[1].split(".")] for match in (front, wanted))
    return (numbers + [0] * len(start))[: len(start)] == start


def requirement(text: str, python: str) -> tuple[str, str]:
    """Of a wheel's Requires-Dist: the name and the specifier; the name is "" where it does not apply to this Python.

    UsageError for markers other than python_version; what belongs to an extra does not apply.
    """
    parts = _REQUIREMENT.fullmatch(text)
    if parts is None:
        raise UsageError(f"{text[:80]!r} is no requirement")
    marker = (parts[3] or "").strip()
    if re.search(r"\bextra\s*==", marker):
        return "", ""
    known = _MARKER.fullmatch(marker) if marker else None
    if marker and known is None:
        raise UsageError(f"the condition {marker[:80]!r} is not known")
    if known is not None and not _fits_one(python, known[1] + known[2]):
        return "", ""
    return parts[1], parts[2].strip()


def plain_name(name: str) -> str:
    """A distribution's name as it is compared: tflite_runtime and TFLite-Runtime are the same."""
    return re.sub(r"[-_.]+", "-", name).lower()
