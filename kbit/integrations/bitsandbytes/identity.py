"""Under which name and version kbit stands in for bitsandbytes, and what says so when a name is not there."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

# What was implemented against, with a local label that tells the two apart wherever a version is printed.
VERSION = "0.50.2+kbit"
_T = TypeVar("_T")


def lives_in(module: str) -> Callable[[_T], _T]:
    """Give a class or function the module name that it has in bitsandbytes.

    transformers looks for "bitsandbytes" in the name of an optimizer class, other tools compare class paths, and a
    pickled model then loads with either package.
    """

    def mark(thing: _T) -> _T:
        thing.__module__ = module
        return thing

    return mark


def absent_names(module: str, advice: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """A module `__getattr__` for names that are deliberately not there: the error says what to use instead.

    advice: name -> what to do. An attribute access raises AttributeError, so that `hasattr` keeps working, and
    `from module import name` an ImportError with the same text (Python would replace an AttributeError's text there).
    """

    def getattr_(name: str) -> NoReturn:
        if name not in advice:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        text = f"{module}.{name} does not exist in kbit's drop-in for bitsandbytes: {advice[name]}"
        raise (ImportError(text, name=module) if _in_from_import(sys._getframe(1)) else AttributeError(text))

    return getattr_


def _in_from_import(frame: Any) -> bool:
    position = frame.f_lasti
    code = frame.f_code.co_code
    return 0 <= position < len(code) and dis.opname[code[position]] == "IMPORT_FROM"


class AbsentLibrary:
    """Stands where bitsandbytes has its compiled library. kbit has none: any use of it says what to call instead."""

    def __init__(self, name: str, advice: str) -> None:
        self._name, self._advice = name, advice

    def __getattr__(self, attribute: str) -> NoReturn:
        raise AttributeError(f"{self._name} is a stand-in without {attribute}: {self._advice}")

    def __repr__(self) -> str:
        return f"<{self._name}: not part of kbit>"
