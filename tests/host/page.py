"""A ComfyUI's own page, in a real browser: playwright-core and chromium, driven by `page.mjs`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: How to run what is skipped where there is no browser.
HOW = "node, PLAYWRIGHT_CORE=<npm's playwright-core>, CHROMIUM=<file>; not needed where node and PATH find them"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Browser:
    """Node, playwright-core's folder and a chromium."""

    node: str
    playwright: Path
    chromium: str


@dataclass(frozen=True)
class Shown:
    """A picture or a video in its node: pixels, seconds, its place on the page, and how far from one colour it is."""

    node: str
    type: str
    video: bool
    width: int
    height: int
    ready: bool
    seconds: float
    across: float
    down: float
    spread: float


@dataclass(frozen=True)
class End:
    """How a run ended: `execution_success`, `execution_error`, `execution_interrupted`, or `refused` by the server."""

    kind: str
    detail: dict[str, Any]
    prompt_id: str


def known_browser() -> Browser | None:
    """What there is to open a page with; None where a part of it is missing."""
    node = shutil.which("node")
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    playwright = _playwright(node) if node else None
    return Browser(node, playwright, chromium) if node and playwright and chromium else None


def _playwright(node: str) -> Path | None:
    """Where `PLAYWRIGHT_CORE` says, where node itself finds it (NODE_PATH), or among npm's global packages."""
    if named := os.environ.get("PLAYWRIGHT_CORE"):
        return Path(named).expanduser().resolve()
    found = _output(node, "-p", "require.resolve('playwright-core/package.json')")
    if found:
        return Path(found).parent
    npm = shutil.which("npm")
    folder = Path(_output(npm, "root", "-g") or ".") / "playwright-core" if npm else None
    return folder if folder and folder.is_dir() else None


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, encoding="utf-8")
    return done.stdout.strip() if done.returncode == 0 else ""


class PageError(RuntimeError):
    """What the driver says went wrong."""


class Page:
    """One page; `with Page(browser) as page`."""

    def __init__(self, browser: Browser) -> None:
        command = [browser.node, str(HERE / "page.mjs"), str(browser.playwright), browser.chromium]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, what: str, **values: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"do": what, **values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PageError(f"{what}: the browser's driver ended, code {self._process.wait(20)}")
        answer = json.loads(line)
        if "error" in answer:
            raise PageError(f"{what}: {answer['error']}")
        return answer["ok"]

    def open(self, url: str) -> None:
        """Loads the host's page."""
        self._ask("open", url=url)

    def open_template(self, pack: str, name: str) -> None:
        """Clicks through Browse Templates."""
        self._ask("template", pack=pack, name=name)

    def load(self, graph: dict[str, Any], name: str) -> None:
        """Loads a saved graph, as dropping its file does."""
        self._ask("load", graph=graph, name=name)

    def missing(self) -> list[str]:
        """Types of nodes in the graph that the page does not know."""
        return self._ask("missing")

    def overlaps(self) -> list[list[str]]:
        """Titles of pairs of nodes of which one covers a part of the other."""
        return self._ask("overlaps")

    def prompt(self) -> Prompt:
        """The graph as the page hands it in."""
        return self._ask("prompt")

    def set(self, name: str, value: Any, kind: str | None = None) -> int:
        """Sets the widgets of a name in nodes of a type, or in all, also in subgraphs; how many there were."""
        return self._ask("set", name=name, value=value, type=kind)

    def evaluate(self, code: str, value: Any = None) -> Any:
        """What a JavaScript function of one JSON value returns in the page."""
        return self._ask("evaluate", code=code, value=value)

    def run(self, seconds: float) -> End:
        """Presses Run and waits for the end."""
        return End(**self._ask("run", seconds=seconds))

    def results(self) -> list[Shown]:
        """What the nodes show."""
        return [Shown(**one) for one in self._ask("results")]

    def trouble(self) -> list[str]:
        """The texts of dialogs and of error messages that are on the page now."""
        return self._ask("trouble")

    def dismiss(self) -> None:
        """Puts dialogs and messages away."""
        self._ask("dismiss")

    def console(self) -> list[dict[str, str]]:
        """What the page's scripts said since the last call: `kind`, `text`, `url`."""
        return self._ask("console")

    def screenshot(self, path: Path, width: int = 2560, height: int = 1440) -> None:
        """The whole page, with the graph fitted into it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._ask("screenshot", path=str(path), width=width, height=height)
