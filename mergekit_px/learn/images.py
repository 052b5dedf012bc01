"""A folder of images by class as arrays, prepared as the processor beside the model says."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_px.checkpoint.json_text import shown
from mergekit_px.errors import InputError, UsageError
from mergekit_px.learn.data import LABELS
from mergekit_px.learn.text_data import classes_of
from mergekit_px.small_files import read_small_file

PROCESSOR_FILE = "preprocessor_config.json"
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"))

_SIDE = 224
_FACTOR = 1 / 255
_BICUBIC = 3
"""Pillow's number, which processors use too."""


def image_files(folder: Path) -> dict[str, list[Path]]:
    """Class -> its images, both in the order of their names."""
    classes = {}
    for one in sorted(folder.iterdir()):
        if one.is_dir():
            files = sorted(file for file in one.rglob("*") if file.suffix.lower() in SUFFIXES)
            if files:
                classes[one.name] = files
    return classes


def image_arrays(folder: Path, where: str, model: Path | None, config: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """``pixel_values`` (images, channels, height, width) and ``labels``.

    Args:
        model: the folder with the processor's settings; without them images get the size in ``config``, values from
            -1 to 1.

    Raises:
        UsageError: Pillow is not installed.
        InputError: no images, one that cannot be read, or classes that the head does not know.
    """
    if importlib.util.find_spec("PIL") is None:
        raise UsageError("images need Pillow", where=where, hint='run: pip install "pxmerge[images]"')
    classes = image_files(folder)
    if not classes:
        raise InputError(
            "no images in folders of classes", where=where, hint="as FOLDER/cat/1.png; images end in .png, .jpg, ..."
        )
    numbers = _numbers(list(classes), config, where)
    settings = _settings(model)
    channels = (config or {}).get("num_channels", 3)
    pixels, labels = [], []
    for name, files in classes.items():
        for file in files:
            pixels.append(_pixels(file, settings, config or {}, channels))
            labels.append(numbers[name])
    if len({one.shape for one in pixels}) > 1:
        raise InputError("the processor gives images of several sizes", where=where)
    return {"pixel_values": torch.from_numpy(np.stack(pixels)), LABELS: torch.tensor(labels)}


def _numbers(classes: list[str], config: Mapping[str, Any] | None, where: str) -> dict[str, int]:
    """The number of each class: by its name in the head's configuration, by the number that it is, or by order."""
    known = classes_of(config)
    if all(name in known for name in classes):
        return {name: known[name] for name in classes}
    if all(name.isdecimal() for name in classes):
        return {name: int(name) for name in classes}
    if known and not all(name.startswith("LABEL_") for name in known):
        unknown = next(name for name in classes if name not in known)
        raise InputError(
            f"the class {shown(unknown)} is unknown to the head: its classes are {shown(', '.join(list(known)[:6]))}",
            where=where,
            hint="name the folders as label2id in config.json does, or by number",
        )
    return {name: number for number, name in enumerate(classes)}


def _settings(model: Path | None) -> Mapping[str, Any]:
    file = None if model is None else model / PROCESSOR_FILE
    if file is None or not file.is_file():
        return {}
    try:
        found = json.loads(read_small_file(file))
    except ValueError as error:
        raise InputError(f"no JSON: {shown(str(error))}", where=str(file)) from None
    return found if isinstance(found, dict) else {}


def _pixels(file: Path, settings: Mapping[str, Any], config: Mapping[str, Any], channels: int) -> np.ndarray[Any, Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"not a readable image: {shown(str(error))}", where=str(file)) from error
    filter_ = Image.Resampling(settings.get("resample", _BICUBIC))
    if settings.get("do_resize", True):
        image = image.resize(_size(settings.get("size", config.get("image_size", _SIDE)), image.size), filter_)
    if settings.get("do_center_crop") and settings.get("crop_size"):
        width, height = _size(settings["crop_size"], image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image, dtype=np.float32)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if settings.get("do_rescale", True):
        values = values * np.float32(settings.get("rescale_factor", _FACTOR))
    if settings.get("do_normalize", True):
        given = (settings.get(key, 0.5) for key in ("image_mean", "image_std"))
        mean, spread = (np.asarray(one, dtype=np.float32).reshape(-1, 1, 1) for one in given)
        values = (values - mean) / spread
    return np.ascontiguousarray(values, dtype=np.float32)


def _size(wanted: Any, now: tuple[int, int]) -> tuple[int, int]:
    """(width, height) as a processor writes it: a number, sides, or the shorter side."""
    if isinstance(wanted, int):
        return wanted, wanted
    if isinstance(wanted, dict) and {"height", "width"} <= wanted.keys():
        return int(wanted["width"]), int(wanted["height"])
    if isinstance(wanted, dict) and "shortest_edge" in wanted:
        factor = int(wanted["shortest_edge"]) / min(now)
        return round(now[0] * factor), round(now[1] * factor)
    if isinstance(wanted, (list, tuple)) and len(wanted) == 2:
        return int(wanted[1]), int(wanted[0])
    raise InputError(f"{PROCESSOR_FILE} has a size of another form: {shown(str(wanted))}")
