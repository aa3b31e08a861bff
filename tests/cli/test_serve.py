"""``hrwkv serve``: one line for every mistake, and from the start to a graceful end as a process."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import fields
from pathlib import Path

import pytest

import hrwkv.server
from hrwkv.server.schemas import ChatRequest, CompletionRequest
from hrwkv.settings import EngineSettings, ServeSettings
from tests.cli.conftest import Files, Run

ROOT = Path(__file__).parents[2]


def test_a_port_in_use_is_one_line(files: Files, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run("serve", files.student, "--port", port)
    assert outcome.code == 2
    place = f"127.0.0.1 port {port}"
    expected = f"cannot listen on {place}: Address already in use; choose another --port or --host"
    assert outcome.err == f"hrwkv: {expected}\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--api-key-env", "HRWKV_TEST_NO_SUCH_KEY"], "HRWKV_TEST_NO_SUCH_KEY is empty or not set"),
        (["--api-key-file", "none.txt"], "none.txt: No such file"),
        (["--api-key-file", "empty.txt"], "empty.txt holds no key: write one a line"),
        (["--api-key-file", "accents.txt"], "letters outside ASCII"),
        (["--tls-key", "key.pem"], "--tls-certificate is None, expected a PEM file as for --tls-key, or ne"),
        (["--tls-certificate", "a.pem"], "--tls-key is None, expected a PEM file as for --tls-certificate"),
        (
            ["--tls-key", "empty.txt", "--tls-certificate", "none.pem"],
            "none.pem and empty.txt do not open: No",
        ),
        (["--tls-key", "empty.txt", "--tls-certificate", "empty.txt"], "empty.txt do not open"),
        (["--port", "70000"], "--port is 70000, expected 0 to 65535"),
        (["--cors-origins", "a.example"], "--cors-origins is 'a.example', expected like https://chat.exam"),
        (["--cors-origins", "https://a.example/"], "'https://a.example/', expected like"),
        (["--request-seconds", "0"], "--request-seconds is 0.0, expected more than 0"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid port 8000"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], says: str, files: Files, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n# no key\n")
    (tmp_path / "accents.txt").write_text("cl\u00e9\n", encoding="utf-8")
    outcome = run("serve", files.student, *flags)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert says in outcome.err


def test_a_directory_without_a_model_is_one_line(run: Run, tmp_path: Path) -> None:
    """The tokenizer was missed in it, which is not what is wrong."""
    outcome = run("serve", tmp_path, "--port", "0")
    assert outcome.code == 2
    assert outcome.err == f"hrwkv: {tmp_path} has no config.json: give the directory of a model\n"


def test_a_missing_extra_is_one_line(files: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # The import below makes the package anew and hangs it into its parent: other tests want the old one back.
    monkeypatch.setattr(hrwkv, "server", hrwkv.server)
    for name in [name for name in sys.modules if name.startswith("hrwkv.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    outcome = run("serve", files.student)
    assert outcome.code == 2
    assert outcome.err == "hrwkv: hrwkv serve needs uvicorn: pip install 'hrwkv[serve]'\n"


def test_help_has_every_default(run: Run) -> None:
    text = " ".join(run("serve", "--help").out.split())
    for shown in ("127.0.0.1", "8000", "4194304", "600.0", "hrwkv serve run/stage3", "/v1/chat/completions"):
        assert shown in text


def test_the_page_names_every_flag_and_field() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    flags = {field.name for settings in (ServeSettings, EngineSettings) for field in fields(settings)}
    negative = {"generation_defaults": "no-generation-defaults"}
    missing = [name for name in flags if f"`--{negative.get(name, name).replace('_', '-')}`" not in page]
    bodies = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert missing + [name for name in bodies if f"`{name}`" not in page] == []


def test_it_answers_and_ends_when_it_is_told_to(files: Files, tmp_path: Path) -> None:
    """A stream that runs when SIGTERM comes is finished; the process ends with 0."""
    (tmp_path / "keys.txt").write_text("# mine\nsecret\n")
    command = [
        sys.executable,
        "-m",
        "hrwkv.cli",
        "serve",
        str(files.student),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [*command, "--api-key-file", str(tmp_path / "keys.txt")], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stderr is not None
    try:
        url = next(found[1] for line in process.stderr if (found := re.search(r"(http://\S+)/v1", line)))
        body = {"prompt": "the", "max_tokens": 200, "ignore_eos": True, "stream": True}
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            first = answer.readline()
            process.send_signal(signal.SIGTERM)
            rest = answer.read()
        assert first.startswith(b"data: {")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.stderr.close()
