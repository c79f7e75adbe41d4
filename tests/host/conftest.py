"""A real ComfyUI on the loopback with the pack in it, started and stopped here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.host.graphs import place_dcvsr, place_swinir
from tests.host.hosts import HOW, Host, known_hosts
from tests.host.page import HOW as HOW_PAGE
from tests.host.page import Browser, Page, known_browser

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
START_SECONDS, RUN_SECONDS = 180, 180
CPU = ("--cpu", "--use-pytorch-cross-attention")

# The tests in there import the host's own modules: `test_inside.py` runs them in the host's Python.
INSIDE = os.environ.get("VSR_INSIDE_HOST") == "1"
collect_ignore = [] if INSIDE else ["inside"]


#: On each of these runs all that stands here.
HOSTS = [] if INSIDE else known_hosts()
BROWSER = known_browser() if HOSTS else None


@pytest.fixture(scope="session", params=HOSTS or [None], ids=lambda host: host.version if host else "no ComfyUI")
def comfyui(request: pytest.FixtureRequest) -> Host:
    """A host; where there is none, what asks for one is skipped."""
    if request.param is None:
        pytest.skip("no ComfyUI")
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line, for all that was skipped, on how to run it."""
    if not INSIDE and not HOSTS:
        terminalreporter.write_line(f"tests/host skipped, no ComfyUI: {HOW}")
    elif not INSIDE and BROWSER is None:
        terminalreporter.write_line(f"tests/host in its page skipped, no browser: {HOW_PAGE}")


@dataclass
class Server:
    """A running host: its address, and what can be asked of it."""

    url: str
    host: Host
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


@contextmanager
def running(host: Host, flags: Sequence[str] = CPU) -> Iterator[Server]:
    """A host, on the loopback alone, with folders of its own."""
    base, port = Path(tempfile.mkdtemp(prefix="coherent-vsr-")), free_port()
    place_pack(base / "custom_nodes")
    command = [
        *(host.python, "main.py", *flags),
        *("--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)),
        *("--disable-api-nodes", "--database-url", f"sqlite:///{base / 'x.db'}"),
    ]
    log = base / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=host.folder, stdout=out, stderr=subprocess.STDOUT)
    made = Server(f"http://127.0.0.1:{port}", host, base, log, process)
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
def server(comfyui: Host) -> Iterator[Server]:
    """The host on the CPU."""
    with running(comfyui) as made:
        yield made


@pytest.fixture(scope="session")
def browser(comfyui: Host) -> Browser:
    """What opens the host's page; where there is none, what asks for a page is skipped before a server is started."""
    if BROWSER is None:
        pytest.skip("no browser")
    return BROWSER


@pytest.fixture(scope="session")
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The host's page in a browser, with the files there that graphs ask for."""
    place_swinir(server.base)
    place_dcvsr(server.base)
    # Else the first visit begins with a dialog; the map would lie over a screenshot's corner.
    assert server.request("/settings/Comfy.TutorialCompleted", True)[0] == 200
    assert server.request("/settings/Comfy.Minimap.Visible", False)[0] == 200
    with Page(browser) as made:
        made.open(server.url)
        yield made


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    """What the host says of all its nodes."""
    return server.get("/object_info")
