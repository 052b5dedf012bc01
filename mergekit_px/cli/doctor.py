"""``pxmerge doctor``: what this machine and this environment have."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_px._version import __version__
from mergekit_px.cli._documents import DoctorDocument
from mergekit_px.cli._extras import EXTRAS
from mergekit_px.cli._options import Json
from mergekit_px.cli._output import Output, output_for
from mergekit_px.cli._units import show_bytes, show_rate

Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Measure the disk of this folder.")]

_PACKAGES = ("torch", "numpy", "safetensors", "huggingface_hub", "pydantic", "typer", "rich")
_RATES = {
    "memory": "memory",
    "read": "read from cache",
    "cold": "read from disk",
    "write": "write to disk",
}
_HUB_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_HUB_DISABLE_XET",
    "HF_HUB_DOWNLOAD_TIMEOUT",
)


def doctor(output: Folder = Path(), json: Json = False) -> int:
    """Show versions, cores, memory, devices, Hub settings and extras, and measure disk and memory bandwidth.

    The measurement takes about a second and writes a temporary file of 256 MB. Of a Hub token only its presence is
    told, never the token.

    \b
    Examples:
      pxmerge doctor
      pxmerge doctor -o /mnt/models --json
    """
    sink = output_for(json=json)
    document = {
        "versions": _versions(),
        "machine": _machine(),
        "devices": _devices(),
        "bandwidth": _bandwidth(output),
        "hub": _hub(),
        "extras": {name: all(map(_is_installed, modules)) for name, modules in EXTRAS.items()},
    }
    sink.document(document, DoctorDocument)
    _show(document, sink)
    return 0


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"pxmerge": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cores": _cores(),
        "memory": _memory(),
    }


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    """Bytes of physical memory, or of the limit that the container sets; None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return total
    return min(total, limit)


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"name": "cpu", "what": platform.processor() or platform.machine()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append({"name": f"cuda:{index}", "what": properties.name, "memory": properties.total_memory})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "what": "Apple GPU"})
    return found


def _bandwidth(directory: Path) -> dict[str, float | None] | None:
    """Bytes per second; None where the folder cannot be written."""
    from mergekit_px.execute import bandwidth

    place = bandwidth.existing_parent(directory)
    try:
        measured = bandwidth.measure(place)
    except OSError:
        return None
    bandwidth.remember(place, measured)
    return asdict(measured)


def _hub() -> dict[str, Any]:
    from huggingface_hub import get_token

    settings = {name: _without_password(os.environ[name]) for name in _HUB_VARIABLES if name in os.environ}
    return {"token": get_token() is not None, "settings": settings}


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


def _is_installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _show(document: dict[str, Any], output: Output) -> None:
    output.heading("Versions")
    output.pairs((name, found or "not installed") for name, found in document["versions"].items())
    machine = document["machine"]
    output.heading("Machine")
    output.pairs(
        [
            ("system", machine["system"]),
            ("cores", machine["cores"]),
            ("memory", machine["memory"] and show_bytes(machine["memory"])),
            *((device["name"], _device(device)) for device in document["devices"]),
        ]
    )
    output.heading("Bandwidth")
    rates = document["bandwidth"]
    if rates is None:
        output.text("not measured: the folder cannot be written")
    else:
        output.pairs((_RATES[name], show_rate(rate)) for name, rate in rates.items() if rate is not None)
    output.heading("Hub")
    output.pairs([("token", "present" if document["hub"]["token"] else "none"), *document["hub"]["settings"].items()])
    output.heading("Extras")
    output.pairs((name, "installed" if there else "not installed") for name, there in document["extras"].items())


def _device(device: dict[str, Any]) -> str:
    return f"{device['what']}, {show_bytes(device['memory'])}" if "memory" in device else str(device["what"])
