from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from hub_server import FakeHub

from mergekit_px.errors import HubError
from mergekit_px.hub.errors import clean, hub_error
from mergekit_px.hub.fetch import fetch
from mergekit_px.hub.reference import HubReference
from mergekit_px.hub.resolve import remote_checkpoint, resolve

SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(HubError) as caught:
        action()
    line = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in line
    assert "hf_" not in line and "Signature" not in line
    return line


def test_a_missing_repository(hub: FakeHub) -> None:
    line = refusal(lambda: resolve(HubReference("org/nothing")))
    assert line.startswith("org/nothing: ")
    assert "no such model on the Hub, or it is private" in line
    assert "./org/nothing" in line and "hf auth login" in line


def test_a_private_repository_without_and_with_a_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/secret", {"config.json": b"{}"}, private=True)
    assert "private" in refusal(lambda: resolve(HubReference("org/secret")))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert resolve(HubReference("org/secret")).files


def test_a_missing_revision(hub: FakeHub) -> None:
    hub.add("org/model", {"config.json": b"{}"})
    line = refusal(lambda: resolve(HubReference("org/model", "v9")))
    assert line.startswith("org/model@v9: ")
    assert "no revision 'v9'" in line and f"{hub.endpoint}/org/model/tree/main" in line


@pytest.mark.parametrize("token", [None, "known"])
def test_a_gated_repository(
    hub: FakeHub, weights: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add("org/gated", {"model.safetensors": weights("a")}, gated=True)
    resolved = resolve(HubReference("org/gated"))
    for action in (lambda: remote_checkpoint(resolved), lambda: fetch(resolved)):
        line = refusal(action)
        assert "restricts access" in line
        assert f"accept the terms at {hub.endpoint}/org/gated" in line and "hf auth login" in line


def test_a_wrong_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", {"config.json": b"{}"})
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert "did not accept the token" in refusal(lambda: resolve(HubReference("org/model")))


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"status": 401, "message": "Invalid credentials in Authorization header"}, "no token is set"),
        ({"status": 403, "message": f"no rights for {SECRET}"}, "no permission"),
        ({"status": 429}, "rate limit is reached; wait some minutes"),
        ({"status": 500}, "in trouble (HTTP 500)"),
        ({"status": 503}, "in trouble (HTTP 503)"),
        ({"status": 418, "message": "short and stout"}, "HTTP 418 (short and stout)"),
        ({"status": 403, "message": "Access to this resource is disabled."}, "disabled"),
        ({"hang_up": True}, "broke before everything had arrived"),
    ],
)
@pytest.mark.parametrize("route", ["info", "storage", "resolve"])
def test_each_fault_is_one_line(
    hub: FakeHub,
    weights: Callable[..., bytes],
    waits: list[float],
    fault: dict[str, Any],
    what: str,
    route: str,
) -> None:
    hub.add("org/model", {"model.safetensors": weights("a"), "config.json": b"{}"})
    resolved = None if route == "info" else resolve(HubReference("org/model"))
    hub.fault(route, **fault)
    if resolved is None:
        assert what in refusal(lambda: resolve(HubReference("org/model")))
    else:
        assert what in refusal(lambda: remote_checkpoint(resolved))
        assert what in refusal(lambda: fetch(resolved))


def test_a_config_cut_short(hub: FakeHub, weights: Callable[..., bytes], waits: list[float]) -> None:
    hub.add("org/model", {"model.safetensors": weights("a"), "config.json": b"{}"})
    hub.fault("resolve", path="config.json", method="GET", cut_after=1)
    line = refusal(lambda: remote_checkpoint(resolve(HubReference("org/model"))))
    assert "downloading config.json failed: the connection broke before everything had arrived" in line


def test_an_answer_cut_short(hub: FakeHub, waits: list[float]) -> None:
    hub.add("org/model", {"config.json": b"{}"})
    hub.fault("info", cut_after=20)
    line = refusal(lambda: resolve(HubReference("org/model")))
    assert "looking it up failed: the connection broke before everything had arrived" in line


def test_trouble_that_passes_is_waited_out(hub: FakeHub, weights: Callable[..., bytes], waits: list[float]) -> None:
    hub.add("org/model", {"model.safetensors": weights("a")})
    hub.fault("info", status=503, times=2)
    resolved = resolve(HubReference("org/model"))
    assert waits == [1.0, 2.0]
    hub.fault("resolve", status=502, times=1)
    hub.fault("storage", status=429, headers={"Retry-After": "3"}, times=1)
    assert list(remote_checkpoint(resolved).tensors) == ["a"]


def test_a_server_that_does_not_answer(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    from huggingface_hub import constants

    hub.add("org/model", {"config.json": b"{}"})
    hub.fault("info", wait=30)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    line = refusal(lambda: resolve(HubReference("org/model")))
    assert "did not answer in time" in line and "HF_HUB_DOWNLOAD_TIMEOUT" in line


def test_nothing_listens_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    line = refusal(lambda: resolve(HubReference("org/model")))
    assert "http://127.0.0.1:1 cannot be reached" in line and "HF_HUB_OFFLINE=1" in line


def test_an_endpoint_that_is_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_px.hub.files import read_small

    hub.add("org/model", {"config.json": b"{}"})
    resolved = resolve(HubReference("org/model"))
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_HEADER_X_REPO_COMMIT", "X-Never-Sent")
    assert "not what a Hub sends" in refusal(lambda: read_small(resolved, "config.json"))


def test_the_client_says_nothing_of_its_own(
    hub: FakeHub, weights: Callable[..., bytes], waits: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/model", {"model.safetensors": weights("a"), "config.json": b"{}"})
    resolved = resolve(HubReference("org/model"))
    hub.fault("storage", cut_after=10, times=2)
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.addHandler(listener)
    try:
        fetch(resolved)
    finally:
        logger.removeHandler(listener)
    assert len(waits) == 2  # it had something to say
    assert said == []
    assert logger.level == level
    assert capfd.readouterr() == ("", "")


def test_tokens_and_addresses_are_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    text = f"Bearer abc.def an-odd-token {SECRET} https://cdn.example.com/x?Signature=1\nsecond line"
    assert clean(text) == "Bearer *** *** *** (address) second line"
    line = str(hub_error(ValueError(text), repo="org/model", revision=None, action="listing"))
    assert line.startswith("org/model: listing failed: ValueError: Bearer ***")
