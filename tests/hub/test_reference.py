from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_px.errors import UsageError
from mergekit_px.hub.reference import HubReference, parse_reference, parse_repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        (f"org/name@{COMMIT}", "org/name", COMMIT),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("Org-1/na.me_2", "Org-1/na.me_2", None),
        ("hf://org/name", "org/name", None),
        ("hf://models/org/name@v1", "org/name", "v1"),
        ("https://huggingface.co/org/name", "org/name", None),
        ("https://huggingface.co/org/name/tree/v1.0", "org/name", "v1.0"),
        ("https://hf.co/org/name/blob/main/config.json?download=true", "org/name", "main"),
        ("https://huggingface.co/org/name/tree/refs/pr/7", "org/name", "refs/pr/7"),
        ("https://huggingface.co/org/name/tree/feature%2Fx", "org/name", "feature/x"),
        ("https://huggingface.co/org/name/discussions", "org/name", None),
    ],
)
def test_hub_references(text: str, repo: str, revision: str | None) -> None:
    assert parse_reference(text) == HubReference(repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "./a/b",
        "../a",
        "/a/b",
        "~/a",
        "~a/b",
        ".",
        "..",
        "name",
        "a/b/c",
        "a//b",
        "a b/c",
        r"C:\models\a",
        "",
        "a/..",
        "a/b.git",
    ],
)
def test_local_paths(text: str) -> None:
    assert parse_reference(text) is None


def test_what_exists_on_disk_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_reference("org/name") is not None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_reference("org/name") is None
    assert parse_repository("org/name") == HubReference("org/name")


def test_an_address_of_another_hub_needs_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"hub\.example\.com is not the Hub"):
        parse_reference("https://hub.example.com/hf/org/name")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.com/hf/")
    assert parse_reference("https://hub.example.com/hf/org/name/tree/v1") == HubReference("org/name", "v1")


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/datasets/org/name",
        "https://huggingface.co/org",
        "hf://org",
        "hf://datasets/org/name",
        "org/name@",
        "org/name@../../x",
        "org/name@a b",
        "org/name@/etc",
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference("https://user:hf_secret@example.com/org/name")
    assert "hf_secret" not in str(caught.value)


def test_no_module_loads_the_client_or_torch_before_it_is_needed() -> None:
    code = (
        "import sys; from mergekit_px.hub import card, fetch, publish, resolve;"
        "print([name for name in ('huggingface_hub', 'httpx2', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_local_path_loads_no_client() -> None:
    code = (
        "import sys; from mergekit_px.hub.reference import parse_reference; parse_reference('./a');"
        "parse_reference('org/name');"
        "print([name for name in ('huggingface_hub', 'httpx2', 'socket', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
