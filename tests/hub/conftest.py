from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "plan", "storage"))

from hub_server import FakeHub, point_client_at


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A small Hub that the real client in this process talks to, without a token."""
    import huggingface_hub

    huggingface_hub.close_session()
    with FakeHub() as server:
        point_client_at(server, tmp_path / "home", monkeypatch)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def logged_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to go offline."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between retries, in seconds: noted, not waited."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def weights() -> Callable[..., bytes]:
    """Makes the bytes of a safetensors file: ``weights("a", "b", elements=1000)``."""
    from safetensors.numpy import save

    def make(*names: str, elements: int = 1000) -> bytes:
        return save({name: np.arange(elements, dtype=np.float32) + number for number, name in enumerate(names)})

    return make


@pytest.fixture
def sharded(weights: Callable[..., bytes]) -> Callable[..., dict[str, bytes]]:
    """Makes the files of a sharded model with one tensor per shard."""
    import json

    def make(count: int, elements: int = 1000) -> dict[str, bytes]:
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        shards = {name: weights(f"layer.{number}", elements=elements) for number, name in enumerate(names)}
        weight_map = {f"layer.{number}": name for number, name in enumerate(names)}
        index = {"metadata": {"total_size": 4 * elements * count}, "weight_map": weight_map}
        return {
            **shards,
            "model.safetensors.index.json": json.dumps(index).encode(),
            "config.json": b'{"model_type": "llama"}',
        }

    return make
