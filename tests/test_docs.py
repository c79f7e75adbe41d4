"""README, CONTRIBUTING and docs against the code: links, paths, modules, commands, messages, the Python example."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.test_pack import EXAMPLES, PAGES, TREES, missing
from vsr_ops.cli.options import make_parser
from vsr_ops.video import Frame, made_info, open_writer

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCS}
README, CLI = TEXTS["README.md"], TEXTS["docs/cli.md"]

#: Folders whose paths in a text must exist.
HOUSES = "vsr_ops|nodes|training|tests|docs|benchmarks|web|example_workflows"
COMMANDS = ("upscale", "plan", "demo", "evaluate", "embed")


def code(text: str) -> Iterator[str]:
    """Everything between backticks: the fenced blocks, then the spans of the rest."""
    yield from re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The fragments of a page's headings, as they are linked to."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead to no file, out of the repository, or to no heading."""
    dead: list[str] = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, fragment = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / name).resolve() if name else page
        there = target.is_relative_to(ROOT) and target.is_file()
        if there and fragment:
            there = fragment in anchors(target.read_text(encoding="utf-8") if name else text)
        if not there:
            dead.append(link)
    return dead


def dead_paths(text: str) -> list[str]:
    """Paths in code that begin with one of our folders and are not there, nor said in .gitignore to be made."""
    made = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    found = {path for part in code(text) for path in re.findall(rf"(?<![\w./-])(?:{HOUSES})/[\w./-]*", part)}
    return sorted(path for path in found if not (ROOT / path).exists() and f"{path.rstrip('/')}/" not in made)


def dead_modules(text: str) -> list[str]:
    """What `python -m` names that is neither ours, with something to run, nor one of the tools."""
    names = {name for part in code(text) for name in re.findall(r"(?:python\S*|launch) -m ([\w.]+)", part)}
    files = {name: (ROOT / name.replace(".", "/")) for name in names - {"pip", "pytest"}}
    return [
        name
        for name, path in files.items()
        if not (path / "__main__.py").is_file() and "__main__" not in _source(path.with_suffix(".py"))
    ]


def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def commands(text: str) -> list[str]:
    """Whole commands of `python -m vsr_ops`, without the comments beside them."""
    lines = [line for part in code(text) for line in part.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if re.match(r"python -m vsr_ops \w+ ", line)]


def options(command: str) -> set[str]:
    """The options of a command, as its help has them."""
    (commands,) = (action for action in make_parser()._actions if isinstance(action.choices, dict))
    assert isinstance(commands.choices, dict)
    return {name for action in commands.choices[command]._actions for name in action.option_strings} - {"-h", "--help"}


# --- The pages ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.encode()) < 6000


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    assert dead_links(ROOT / name, TEXTS[name]) == []


@pytest.mark.parametrize("name", TEXTS)
def test_paths_exist(name: str) -> None:
    assert dead_paths(TEXTS[name]) == []


@pytest.mark.parametrize("name", TEXTS)
def test_modules_can_be_run(name: str) -> None:
    assert dead_modules(TEXTS[name]) == []


@pytest.mark.parametrize("name", TEXTS)
def test_commands_are_understood(name: str) -> None:
    for command in commands(TEXTS[name]):
        make_parser().parse_args(shlex.split(command)[3:])


def test_the_checks_would_see_it() -> None:
    page = ROOT / "docs/cli.md"
    text = (
        "[a](no.md) [b](../README.md#no-such) [c](../README.md#which-weights) [d](https://a.b) [e](../../x) [f](#no)\n"
    )
    assert dead_links(page, text) == ["no.md", "../README.md#no-such", "../../x", "#no"]
    text = "`vsr_ops/svd.py` vsr_ops/no.py `tests/host/screenshots` `../clips/tests/x`\n```\npython docs/no.py\n```\n"
    assert dead_paths(text) == ["docs/no.py", "vsr_ops/svd.py"]
    text = "`python -m vsr_ops plan a` `python -m vsr_ops.svd` `accelerate launch -m training.loop`\n"
    assert sorted(dead_modules(text)) == ["training.loop", "vsr_ops.svd"]
    assert commands(text) == ["python -m vsr_ops plan a"]
    assert sum(len(commands(text)) for text in TEXTS.values()) > 8


# --- What the README and the lists must hold ------------------------------------------------------------------------


def test_the_readme_names_every_example() -> None:
    assert {path.stem for path in EXAMPLES} == set(re.findall(r"\| `(\w+)` \|", README))


def test_the_readme_names_every_folder_of_weights() -> None:
    """Constants of the nodes that end in FOLDER are folders under the host's models."""
    pairs = [
        match
        for tree in TREES
        for match in re.findall(
            r"^(\w+_FOLDER(?:, \w+_FOLDER)*) = (.+)$", tree.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    folders = {folder for _, values in pairs for folder in re.findall(r'"(\w+)"', values)}
    assert len(folders) > 6
    assert {folder for folder in folders if not re.search(f"`(models/)?{folder}`", README)} == set()


def test_every_node_is_listed_by_its_help_page() -> None:
    assert sorted(
        re.findall(r"^\| \[[^]]+\]\(../web/docs/(\w+)\.md\)", TEXTS["docs/nodes.md"], re.MULTILINE)
    ) == sorted(PAGES)


def test_every_recipe_is_named() -> None:
    recipes = {path.name for path in (ROOT / "training/recipes").glob("*.toml")}
    assert set(re.findall(r"\w+\.toml", TEXTS["docs/training.md"])) == recipes


# --- The command line -----------------------------------------------------------------------------------------------


def test_every_option_is_described() -> None:
    named = set(re.findall(r"--[a-z][a-z-]*", CLI)) - {"--help"}
    assert named == {option for command in COMMANDS for option in options(command)}


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", CLI, re.MULTILINE | re.DOTALL)
    with open_writer(tmp_path / "in.mp4", made_info(24, 16, 3), size=(16, 24)) as writer:
        for i in range(3):
            writer.write(Frame(torch.full((3, 16, 24), i / 4), None, i))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/cli.md", "exec"), {})
    assert (tmp_path / "out.mp4").stat().st_size > 0


# --- Messages -------------------------------------------------------------------------------------------------------


def messages(text: str) -> list[str]:
    """What a page quotes: the spans that begin a point, up to its colon, and every other that stands for a value."""
    points = re.findall(r"^- (`[^`]+`(?: and `[^`]+`)*):", text, re.MULTILINE)
    return [span for point in points for span in re.findall(r"`([^`]+)`", point)] + re.findall(
        r"`([^`\n]*…[^`\n]*)`", text
    )


def test_the_messages_that_are_quoted_are_the_codes() -> None:
    quoted = messages(TEXTS["docs/troubleshooting.md"])
    assert len(quoted) > 40
    assert {message: parts for message in quoted if (parts := missing(message))} == {}


def test_the_check_of_messages_would_see_it() -> None:
    text = "- `overlap is …: expected 7`: do that.\n- `one` and `two`: do that. Set `w` to 0.\n- Set `this`.\n"
    assert messages(text) == ["overlap is …: expected 7", "one", "two", "overlap is …: expected 7"]
