"""The text of a YAML file that a person wrote."""

from __future__ import annotations

from pathlib import Path

from mergekit_px.errors import InputError, InputNotFoundError, RecipeError
from mergekit_px.located.yaml_text import LONGEST_TEXT, Place
from mergekit_px.small_files import read_small_file


def read_text(path: Path, kind: str) -> str:
    """The text of a file.

    Args:
        kind: what the file should be, for messages: ``recipe``.

    Raises:
        RecipeError: there is no such file, or it is none that can be read as UTF-8.
    """
    if path.is_dir():
        raise RecipeError(f"a folder is no {kind}", where=str(path), hint="give the file in it")
    try:
        data = read_small_file(path, limit=4 * LONGEST_TEXT + 4)
    except InputNotFoundError:
        raise RecipeError(f"there is no such {kind}", where=str(path)) from None
    except InputError as error:
        raise RecipeError(error.what, where=str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        place = Place(str(path), before.count(b"\n") + 1, column)
        raise RecipeError("not UTF-8 text", where=str(place), hint="save the file as UTF-8") from None
