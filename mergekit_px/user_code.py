"""Code of the user's: functions that make models or score them, and plug-ins. Run only where that is allowed."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mergekit_px.errors import InputNotFoundError, PxmergeError, UsageError
from mergekit_px.escaping import escaped_line as shown


def user_function(place: str, *, allow_code: bool) -> Callable[..., Any]:
    """The function at ``file.py:function``; what it raises becomes a ``UsageError`` of one line.

    Raises:
        UsageError: not allowed, not of that form, no such function, or a file that cannot be imported.
    """
    file, colon, name = place.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"{shown(place)!r} names no function", hint="write file.py:function")
    if not allow_code:
        raise UsageError(f"{place} is code, which is not run unless asked for", hint="allow it with --allow-code")
    module = import_file(Path(file).expanduser())
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"the file has no function {name}", where=file)

    @functools.wraps(function)
    def guarded(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except PxmergeError:
            raise
        except Exception as error:
            raise _raised(error, place) from error

    return guarded


def _raised(error: Exception, place: str) -> UsageError:
    what = f"it raised {type(error).__name__}: {error}"
    return UsageError(what, where=place, hint="PXMERGE_DEBUG=1 shows the traceback")


def import_file(path: Path) -> ModuleType:
    """A Python file as a module, imported once.

    Raises:
        InputNotFoundError: no such file.
        UsageError: the file raises while it is imported.
    """
    if not path.is_file():
        raise InputNotFoundError("no such file", where=str(path))
    name = f"pxmerge_user_{path.resolve().as_posix().replace('/', '_').replace('.', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _raised(error, str(path)) from error
    return module
