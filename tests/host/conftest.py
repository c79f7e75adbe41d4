"""A real ComfyUI on the loopback with the pack in it, started and stopped here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
START_SECONDS, RUN_SECONDS = 180, 180

# The tests in there import the host's own modules: `test_inside.py` runs them in the host's Python.
INSIDE = os.environ.get("VSR_INSIDE_HOST") == "1"
collect_ignore = [] if INSIDE else ["inside"]


def comfyui_path() -> Path | None:
    """The host's folder: `COMFYUI_PATH`, or `~/ComfyUI`; nothing where there is none."""
    folder = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "ComfyUI").expanduser()
    return folder if (folder / "main.py").is_file() else None


def comfyui_python(folder: Path) -> str:
    """The host's Python: `COMFYUI_PYTHON`, its own environment's, or this one."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        return named
    inner = Path("Scripts/python.exe") if os.name == "nt" else Path("bin/python")
    found = [folder / name / inner for name in ("venv", ".venv") if (folder / name / inner).exists()]
    return str(found[0]) if found else sys.executable


@pytest.fixture(scope="session", autouse=True)
def needs_host() -> None:
    """Without a host, what stands here is skipped."""
    if not INSIDE and comfyui_path() is None:
        pytest.skip("no ComfyUI")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line, for all that was skipped, on how to run it."""
    if not INSIDE and comfyui_path() is None:
        terminalreporter.write_line(
            "tests/host skipped, no ComfyUI: COMFYUI_PATH=<its folder> COMFYUI_PYTHON=<its Python> pytest tests/host"
        )


@dataclass
class Server:
    """A running host: its address, and what can be asked of it."""

    url: str
    base: Path
    log: Path
    process: subprocess.Popen[bytes]
    client: str = field(default_factory=lambda: uuid.uuid4().hex)

    def request(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """Status and content of a GET, or of a POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str) -> Any:
        """JSON of a path."""
        status, content = self.request(path)
        assert status == 200, (path, status, content[:2000])
        return json.loads(content)

    def queue(self, prompt: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of handing in a prompt."""
        status, content = self.request("/prompt", {"prompt": prompt, "client_id": self.client})
        return status, json.loads(content)

    def wait(self, prompt_id: str, seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """The history of a prompt once it has ended, in whatever way."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            assert self.process.poll() is None, f"the server ended:\n{self.tail()}"
            time.sleep(0.1)
        raise AssertionError(f"no result in {seconds} s:\n{self.tail()}")

    def run(self, prompt: dict[str, Any], seconds: float = RUN_SECONDS) -> dict[str, Any]:
        """The history of a prompt that must be accepted."""
        status, answer = self.queue(prompt)
        assert status == 200, json.dumps(answer, indent=1)[:4000]
        return self.wait(answer["prompt_id"], seconds)

    def tail(self, characters: int = 4000) -> str:
        """The end of the server's log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-characters:]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place_pack(custom_nodes: Path) -> None:
    """The pack in the host's folder: linked, or copied where links are not allowed."""
    custom_nodes.mkdir(parents=True)
    place = custom_nodes / "coherent-vsr"
    try:
        place.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", "__pycache__", ".venv", "runs"))


def wait_until_up(server: Server) -> None:
    """Returns when the host answers; fails with the end of its log when it does not."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if server.request("/object_info/VSRLoadLite")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)
    pytest.fail(f"ComfyUI did not answer in {START_SECONDS} s:\n{server.tail()}", pytrace=False)


@pytest.fixture(scope="session")
def host_folder(needs_host: None) -> Path:
    """The host's folder."""
    folder = comfyui_path()
    assert folder is not None
    return folder


@pytest.fixture(scope="session")
def host_python(host_folder: Path) -> str:
    """The host's Python."""
    return comfyui_python(host_folder)


@pytest.fixture(scope="session")
def server(host_folder: Path, host_python: str) -> Iterator[Server]:
    """The host, on the loopback alone, with folders of its own."""
    base, port = Path(tempfile.mkdtemp(prefix="coherent-vsr-")), free_port()
    place_pack(base / "custom_nodes")
    command = [
        *(host_python, "main.py", "--cpu", "--use-pytorch-cross-attention"),
        *("--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)),
        *("--disable-api-nodes", "--database-url", f"sqlite:///{base / 'x.db'}"),
    ]
    log = base / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=host_folder, stdout=out, stderr=subprocess.STDOUT)
    made = Server(f"http://127.0.0.1:{port}", base, log, process)
    try:
        wait_until_up(made)
        yield made
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    """What the host says of all its nodes."""
    return server.get("/object_info")
