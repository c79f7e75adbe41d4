"""docs/equations.md against the code: the functions and tests that it names, and the papers beside equations' numbers.

Everything is read as text: neither the host nor what trains is needed.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/equations.md").read_text(encoding="utf-8")
FILES = sorted(path for house in ("vsr_ops", "nodes", "training") for path in (ROOT / house).rglob("*.py"))

#: The papers, and how many equations each numbers.
PAPERS = {"DC-VSR": 14, "SDATC": 13, "SATeCo": 0}
#: What the papers restate, with numbers of their own.
OTHERS = ("SAG", "PAG")

# --- The page -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One equation's row."""

    paper: str
    equation: str
    functions: tuple[str, ...]
    files: tuple[str, ...]
    tests: tuple[str, ...]

    @property
    def number(self) -> int | None:
        """What the paper numbers it; nothing for what it leaves without."""
        return int(self.equation) if self.equation.isdecimal() else None


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(page: str) -> list[Row]:
    """Every row that begins with a paper. Raises AssertionError for what stands in a cell beside names and links."""
    found: list[Row] = []
    for line in page.splitlines():
        match = re.match(rf"\| ({'|'.join(PAPERS)})[ ,]+([^|]+?) \|", line)
        if match is None:
            continue
        assert len(cells(line)) == 5, line
        functions, files, tests = cells(line)[2:]
        rest = [re.sub(r"`[^`]+`|\[[^]]+\]\([^)]+\)|<br>", "", cell).strip() for cell in (functions, files, tests)]
        assert rest in (["", "", ""], ["not yet", "", ""]), line
        links = tuple(link.removeprefix("../") for link in re.findall(r"\]\(([^)]+)\)", files))
        names = [tuple(re.findall(r"`([^`]+)`", cell)) for cell in (functions, tests)]
        found.append(Row(match[1], match[2], names[0], links, names[1]))
    return found


ROWS = rows(PAGE)


def named(page: str) -> list[str]:
    """Everything in backticks that is a dotted name of one of our packages, or a name in a file."""
    spans = re.findall(r"`([^`\n]+)`", page)
    dotted = r"(?:vsr_ops|nodes|training|tests|benchmarks)\.[\w.]+"
    return [span for span in spans if "::" in span or re.fullmatch(dotted, span)]


@cache
def defined(path: Path) -> frozenset[str]:
    """What a file's top level and its classes define, by dotted name."""

    def names(body: list[ast.stmt], before: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield before + node.name
            if isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{before}{node.name}.")
            if isinstance(node, ast.Assign):
                yield from (before + target.id for target in node.targets if isinstance(target, ast.Name))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield before + node.target.id

    return frozenset(names(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def home(name: str) -> tuple[Path, str] | None:
    """The file that a name stands in, and its name there; None where there is no such file or it has no such name."""
    if "::" in name:
        file, _, inner = name.partition("::")
        path = ROOT / file
        return (path, inner) if path.is_file() and inner in defined(path) else None
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        path = ROOT.joinpath(*parts[:count]).with_suffix(".py")
        if path.is_file():
            inner = ".".join(parts[count:])
            return (path, inner) if inner in defined(path) else None
    return None


def test_every_name_exists() -> None:
    names = named(PAGE)
    assert len(set(names)) > 100
    assert sorted({name for name in names if home(name) is None}) == []


def test_a_name_that_is_gone_would_be_seen() -> None:
    page = "`vsr_ops.sampling.guidance.add_dssag` `nodes/host/hooks.py::post_cfg` `vsr_ops.sampling.guidance.gone`"
    page += " `tests/test_equations.py::test_gone` `vsr_ops/no.py::f` `vsr_ops.no.f` `nodes/session/run.py::Run.gamma`"
    page += " `nodes/session/run.py::Run.gone` `GUIDANCE` `vsr_ops.sampling.guidance.GUIDANCE` `vsr_ops/sampling`"
    lost = ["vsr_ops.sampling.guidance.gone", "tests/test_equations.py::test_gone", "vsr_ops/no.py::f", "vsr_ops.no.f"]
    assert [name for name in named(page) if home(name) is None] == [*lost, "nodes/session/run.py::Run.gone"]


@pytest.mark.parametrize("paper", PAPERS)
def test_every_equation_has_one_row(paper: str) -> None:
    numbers = [row.number for row in ROWS if row.paper == paper and row.number is not None]
    assert numbers == list(range(1, PAPERS[paper] + 1))


def test_satecos_parts_have_theirs() -> None:
    assert [row.equation for row in ROWS if row.paper == "SATeCo"] == ["SFA", "TFA", "upscaler", "refiner"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.paper} {row.equation}")
def test_a_row_has_functions_their_files_and_tests_or_nothing(row: Row) -> None:
    assert bool(row.functions) == bool(row.files) == bool(row.tests)
    homes = [found for name in row.functions if (found := home(name)) is not None]
    assert list(dict.fromkeys(path.relative_to(ROOT).as_posix() for path, _ in homes)) == list(row.files)
    assert all(re.fullmatch(r"tests/[\w/]+\.py::test_\w+", test) for test in row.tests)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.number and row.functions], ids=lambda row: f"{row.paper} {row.equation}"
)
def test_the_code_names_the_equation(row: Row) -> None:
    """A search in the code for "SDATC" and its number leads to the functions."""
    assert any((row.paper, row.number) in numbers_in(ROOT / file) for file in row.files)


# --- Numbers in the code's texts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mention:
    """An equation's number, whose it is said to be, and the sentence that says so."""

    paper: str | None
    number: int
    sentence: str


#: "equation 8", "equations 12 and 13", "eq. 8 or 9", "equations 8 to 10", "equation (7)".
NUMBERS = re.compile(
    r"\beq(?:uation|n)?s?\.?\s+\(?\d+\)?(?:\s*(?:,\s*(?:and|or)|,|and|or|to|-|–)\s*\(?\d+\)?)*", re.IGNORECASE
)
#: A work that a sentence cites by its authors and year.
CITED = r"[A-Z][\w-]+(?: et al\.?,?| and [A-Z][\w-]+)(?:[^.;()]*?)\b(?:19|20)\d\d"
WHOSE = re.compile(rf"(?<![\w-])(?:{'|'.join((*PAPERS, *OTHERS))})(?![\w-])|{CITED}")
#: Not after what is shortened with a full stop.
SENTENCES = re.compile(r"(?<=[.!?])(?<!\beq\.)(?<!\beqs\.)(?<!\bal\.)(?<!\be\.g\.)\s+(?=\W?[A-Z])")


def mentions(text: str) -> list[Mention]:
    """Every equation's number of a text, with the paper whose name stands in the same sentence: the nearest before it,
    else the nearest after."""
    found: list[Mention] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in SENTENCES.split(" ".join(paragraph.split())):
            names = [(match.start(), match[0]) for match in WHOSE.finditer(sentence)]
            for match in NUMBERS.finditer(sentence):
                before = [name for place, name in names if place < match.start()]
                after = [name for place, name in names if place > match.start()]
                paper = before[-1] if before else after[0] if after else None
                digits = [int(number) for number in re.findall(r"\d+", match[0])]
                if re.search(r"\d\)?\s*(?:to|-|–)\s*\(?\d", match[0]):
                    digits = list(range(digits[0], digits[-1] + 1))
                found += [Mention(paper, number, sentence) for number in digits]
    return found


def texts(source: str) -> Iterator[str]:
    """A file's strings (docstrings among them; of f-strings what is fixed), and its comments, lines in a row as one."""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value
    row, lines = -1, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != row + 1:
                yield " ".join(lines)
                lines = []
            row = token.start[0]
            lines.append(token.string.lstrip("#: "))
    yield " ".join(lines)


@cache
def mentions_in(path: Path) -> tuple[Mention, ...]:
    return tuple(mention for text in texts(path.read_text(encoding="utf-8")) for mention in mentions(text))


def numbers_in(path: Path) -> set[tuple[str | None, int]]:
    return {(mention.paper, mention.number) for mention in mentions_in(path)}


def wrong(found: list[Mention]) -> list[Mention]:
    """Numbers without a paper, and those that their paper has not."""
    return [each for each in found if each.paper is None or not 0 < each.number <= PAPERS.get(each.paper, each.number)]


def test_every_number_names_its_paper() -> None:
    found = {path.relative_to(ROOT).as_posix(): list(mentions_in(path)) for path in FILES}
    assert sum(len(each) for each in found.values()) > 40
    assert {file: bad for file, each in found.items() if (bad := wrong(each))} == {}


def test_a_bare_number_would_be_seen() -> None:
    bare = [
        "Equation 7: attention.",
        "SDATC's alignment.\n\nEquations 12 and 13: the error.",
        "DC-VSR's guidance. It is eq. 8.",
        "DSSAG, equation 8",
        "DC-VSR, equation 15",
        "SATeCo, equation 1",
        "By equation (4)-(6), as it were.",
    ]
    assert [[each.number for each in wrong(mentions(text))] for text in bare] == [
        [7], [12, 13], [8], [8], [15], [1], [4, 5, 6]
    ]  # fmt: skip
    told = "DC-VSR equation 8, or 9 when on. The step of\nSDATC's equations 8 to 10; eqs. 12 and 13 of SDATC, too."
    told += " VIF (Sheikh and Bovik 2006, equations 6-15). (SAG, section 4; DC-VSR, equation 5) An equation for 2."
    assert wrong(mentions(told)) == []
    assert [(each.paper, each.number) for each in mentions(told)][:7] == [
        *(("DC-VSR", n) for n in (8, 9)), *(("SDATC", n) for n in (8, 9, 10, 12, 13))
    ]  # fmt: skip
    assert mentions(told)[-1] == Mention("DC-VSR", 5, mentions(told)[-1].sentence)
    source = '#: By equation\n# 3 of it.\nx = f"{y} equation" " 4"\n\n\ndef f():\n    """Equation 5."""\n'
    assert sorted(each.number for text in texts(source) for each in wrong(mentions(text))) == [3, 4, 5]
