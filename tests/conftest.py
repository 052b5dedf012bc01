"""What every test runs under: one thread, no network beyond this machine, no Hub but those that tests start."""

from __future__ import annotations

import importlib
import ipaddress
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # for the helpers beside the tests

_HOME = tempfile.mkdtemp(prefix="pxmerge-tests-")

# Libraries read these when they are imported, processes that tests start inherit them.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HOME": _HOME,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MPLCONFIGDIR": _HOME,
    }
)
# Without bytecode every process that a test starts would compile the package anew.
for _name in ("HF_TOKEN", "PXMERGE_DEBUG", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(_name, None)

from published_documents import hold_to_the_schema  # noqa: E402

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def _is_this_machine(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return name in ("", "localhost")


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if not _is_this_machine(host):
        raise PermissionError(f"a test reached for the network: {event} {host}")


sys.addaudithook(_refuse_network)

hold_to_the_schema()


@pytest.fixture(scope="session")
def import_benchmark() -> Callable[[str], ModuleType]:
    """Imports a module of ``benchmarks/``, which may import others there, by its name."""

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
            return importlib.import_module(name)

    return load


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `models` of the checkpoints base, math and code: a tiny Llama of four layers and two fine-tunes.

    Beside the fine-tunes are files of statistics, as if made of data that say the same about every parameter.
    """
    import torch
    from folders import write_llamas
    from safetensors.torch import save_file

    from mergekit_px.methods import load_methods

    folder = tmp_path_factory.mktemp("examples") / "models"
    base = write_llamas(folder, "math", "code", layers=4)
    statistics = {
        name + kind.suffix: torch.ones(kind.shape(tuple(tensor.shape)))
        for kind in {method.companions for method in load_methods().values() if method.companions}
        for name, tensor in base.items()
        if tensor.ndim == 2
    }
    for name in ("math", "code"):
        save_file(statistics, folder / f"{name}-statistics.safetensors")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)
