"""Exercises to implement: a check accepts any right answer, and says what a typical wrong one does.

    check = Exercise("advantages", run, is_right, hints)
    check(my_function)      prints one line; True, False, or None for "not tried yet"

A hint is what a wrong value shows; it never shows the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exercise:
    """One exercise. Called with the reader's answer: a function, or a value."""

    name: str
    run: Callable[[Any], Any]  # what the answer gives on the cases of the check
    is_right: Callable[[Any], bool]
    hints: Sequence[tuple[Callable[[Any], bool], str]]  # (does the value show this mistake?, what to say), first match
    otherwise: str = "not yet: compare it with the formula above on a small case"

    def __call__(self, answer: Any) -> bool | None:
        """Judge an answer. An answer of None, or a function that returns None, is not tried yet."""
        try:
            value = None if answer is None else self.run(answer)
        except Exception as error:  # the reader's own code
            return self._say(False, f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        if value is None:
            return self._say(None, "not tried yet")
        if _holds(self.is_right, value):
            return self._say(True, "right")
        return self._say(False, next((text for shows, text in self.hints if _holds(shows, value)), self.otherwise))

    def _say(self, result: bool | None, text: str) -> bool | None:
        print(f"{self.name}: {text}")
        return result


def _holds(test: Callable[[Any], bool], value: Any) -> bool:
    """Does a test hold? One that cannot be applied to the value, of another shape, does not."""
    try:
        return bool(test(value))
    except Exception:
        return False
