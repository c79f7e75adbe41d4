"""Development commands, the same on every system: `python dev.py demo | test | check`.

Each makes an environment first if there is none yet: `.venv` beside this file, or the folder that VSR_VENV names. Set
VSR_PYTHON to use a Python that already has everything (a ComfyUI's, say) and install nothing.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
#: Tools of development, beside what requirements.txt names.
TOOLS = ["torch", "torchvision", "accelerate", "pytest", "pytest-cov", "pytest-xdist", "ruff", "pyright[nodejs]"]
TOOLS += ["tomli; python_version < '3.11'"]
#: Processes that share the tests: one holds about 1.5 GB.
PROCESSES = min(4, os.cpu_count() or 1)


def run(*command: str | Path) -> None:
    """Runs a command in the repository; a failure ends this script with the same exit code."""
    # Tests start many processes: what one of them has compiled is kept for the others.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    code = subprocess.run([str(part) for part in command], cwd=ROOT, env=kept, check=False).returncode
    if code:
        sys.exit(code)


def environment() -> Path:
    """The Python of the environment, made and filled when it is missing or the requirements changed."""
    if chosen := os.environ.get("VSR_PYTHON"):
        return Path(chosen)
    folder = Path(os.environ.get("VSR_VENV", ROOT / ".venv"))
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    files = [ROOT / "requirements.txt", ROOT / "constraints.txt"]
    stamp = folder / "installed.txt"
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files) + repr(TOOLS).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, with_pip=True)
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            # Python compiles what it imports: of torch and its libraries that is little.
            "--no-compile",
            "-c",
            files[1],
            "-r",
            files[0],
            *TOOLS,
        )
        stamp.write_text(wanted)
    return python


def demo(python: Path, rest: list[str]) -> None:
    """Upscales the bundled clip on bundled weights, prints the table, writes pictures to demo_output/."""
    # Its own folder in the repository: a second run may replace what the first one made.
    run(python, "-m", "vsr_ops", "demo", "--overwrite", *rest)


def test(python: Path, rest: list[str]) -> None:
    """Runs the tests, in two to four processes where all are asked for. A ComfyUI's tests share its server: in one."""
    alone = rest or os.environ.get("COMFYUI_HOSTS") or os.environ.get("COMFYUI_PATH")
    # Neighbours stay together, for their fixtures, until a process has nothing left to do.
    together = [] if alone else ["-n", str(PROCESSES), "--dist", "worksteal"]
    run(python, "-m", "pytest", *together, *rest)


def check(python: Path, rest: list[str]) -> None:
    """Lints, checks the format and the types."""
    run(python, "-m", "ruff", "check", ".")
    run(python, "-m", "ruff", "format", "--check", ".")
    run(python, "-m", "pyright", "--pythonpath", python, *rest)


COMMANDS = {"demo": demo, "test": test, "check": check}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__)
        for name, command in COMMANDS.items():
            print(f"  {name:6}{command.__doc__}")
        sys.exit(2)
    COMMANDS[sys.argv[1]](environment(), sys.argv[2:])


if __name__ == "__main__":
    main()
