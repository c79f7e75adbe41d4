"""Places to write: what may be replaced, parts under names of their own, and one run at a time into an output.

An input survives. Without `overwrite` nothing is replaced, and with it only what has the very name that is written.
What is not whole yet stands under a hidden name that nothing had before. A second run into one output is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import VideoError

_MARK = b"Coherent VSR: while this file is locked, a run writes the output that it is named after.\n"
"""The whole content of a lock file. What holds anything else is someone's own and stays."""

_TRIES = 100
_LONG = 200
"""Bytes of a name that leave no room for a hidden name made of it; file systems take 255."""

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        # A byte far behind the end: Windows keeps others from what is locked.
        os.lseek(file, 2**30, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def files_of(path: Path) -> list[Path]:
    """An input and, where it is a folder, every file below it, for `refuse_inputs`."""
    return [path, *(file for file in path.rglob("*") if file.is_file())] if path.is_dir() else [path]


def refuse_inputs(output: Path, inputs: Iterable[Path]) -> None:
    """Raises VideoError where `output` is one of `inputs` or a folder that holds one, by whatever name or link."""
    there = _identity(output)
    if there is None:
        return
    folder = output.is_dir()
    within = {_identity(entry) for entry in output.iterdir()} if folder else set[object]()
    above: dict[Path, Path] = {}
    for path in inputs:
        found = _identity(path)
        if found is not None and found == there:
            alias = "" if path == output else f" ('{path}' under another name)"
            raise VideoError(f"'{output}' is the input itself{alias}; expected another name for the output")
        if found is not None and found in within:
            raise _holds(output, path)
        above.setdefault(path.resolve().parent if path.is_symlink() else path.parent, path)
    for parent, path in above.items() if folder else ():
        real = parent.resolve()
        if there in [_identity(each) for each in (real, *real.parents)]:
            raise _holds(output, path)


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raises VideoError where something stands at `path` and may not be replaced; a folder of hidden files is free."""
    if overwrite or not os.path.lexists(path) or (path.is_dir() and not _shown(path)):
        return
    raise VideoError(f"'{path}' already exists; choose another name or allow overwriting (--overwrite)")


def new_part(path: Path, folder: bool = False) -> Path:
    """Makes an empty hidden file (or folder) under a name that was free, for what is to become `path`; its name.

    It lies beside `path`, or in it where that is a folder already, so that a rename suffices. Raises OSError.
    """
    for _ in range(_TRIES):
        part = _hidden(path, f"part-{secrets.token_hex(4)}", path.suffix)
        with suppress(FileExistsError):
            if folder:
                part.mkdir()
            else:
                part.touch(exist_ok=False)
            return part
    raise FileExistsError(errno.EEXIST, "no free name for a part", str(path))


def give_name(part: Path, path: Path, overwrite: bool) -> None:
    """Renames what is whole. Without `overwrite` nothing is replaced, not even what came there a moment ago.

    A folder never replaces one that holds anything. Raises OSError.
    """
    if part.is_dir() or not overwrite:
        _rename_only(part, path)
    else:
        part.replace(path)


def remove_part(part: Path) -> None:
    """Removes what `new_part` made, and what this run wrote into it. Raises OSError."""
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part)
    else:
        part.unlink(missing_ok=True)


@contextmanager
def whole(path: Path, overwrite: bool = False) -> Generator[Path, None, None]:
    """A part to write into; it becomes `path` when the block ends well, and is removed when it does not.

    Raises OSError, FileExistsError for what may not be replaced.
    """
    part = new_part(path)
    try:
        yield part
        give_name(part, path, overwrite)
    finally:
        with suppress(OSError):
            remove_part(part)


@contextmanager
def claimed(path: Path) -> Generator[None, None, None]:
    """Holds the output at `path` for this run, by a locked file beside it, or in it where it is a folder already.

    The system lets the lock go with the process, so a killed run blocks none. Raises VideoError when another run
    holds the output, in this process too, and when nothing can be written there.
    """
    lock = _hidden(path, "lock") if path.is_dir() else path.parent / f".{_short(path.name)}.lock"
    file = _hold(path, lock)
    try:
        yield
    finally:
        _let_go(lock, file)


@contextmanager
def held_folder(folder: Path) -> Generator[None, None, None]:
    """Makes `folder` where it is not there and holds it as `claimed` does; what was made and stays empty goes again.

    Raises VideoError as `claimed` does, and where there can be no such folder.
    """
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VideoError(f"folder '{folder}' cannot be made ({error.strerror}); choose another output") from error
    try:
        with claimed(folder):
            yield
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


def _hold(path: Path, lock: Path) -> int:
    for _ in range(_TRIES):
        opened = _open(path, lock)
        if opened is None:
            continue
        file, made = opened
        try:
            _lock(file)
        except OSError as error:
            # Where the file system knows no locks, the file that this run made is its lock.
            if error.errno in _BUSY or not made:
                os.close(file)
                raise VideoError(
                    f"another run is writing '{path}'; wait for its end or choose another output (where there is no"
                    f" such run, remove '{lock}')"
                ) from error
        if _stands(lock, file):
            return file
        # The run that held it removed it between our opening and our locking.
        os.close(file)
    raise VideoError(f"'{lock}' comes and goes: many runs begin to write '{path}' at once; choose another output")


def _open(path: Path, lock: Path) -> tuple[int, bool] | None:
    """The lock file and whether it was made here; None where it went away meanwhile. Nothing in it is changed."""
    flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        return _make(lock, flags), True
    except FileExistsError:
        pass
    except OSError as error:
        raise VideoError(
            f"folder '{lock.parent}' cannot be written to ({error.strerror}); choose another output"
        ) from error
    try:
        file = os.open(lock, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _in_the_way(path, lock, str(error.strerror)) from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise _in_the_way(path, lock, "not a file")
    return file, False


def _make(lock: Path, flags: int) -> int:
    file = os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(file, _MARK)
    except OSError:
        os.close(file)
        lock.unlink()
        raise
    return file


def _let_go(lock: Path, file: int) -> None:
    os.lseek(file, 0, os.SEEK_SET)
    ours = _stands(lock, file) and os.read(file, len(_MARK) + 1) == _MARK
    if sys.platform == "win32":
        # Windows removes no file that is open; should another run have it open by now, it stays for that one.
        os.close(file)
    with suppress(OSError):
        if ours:
            lock.unlink()
    if sys.platform != "win32":
        os.close(file)


def _stands(lock: Path, file: int) -> bool:
    """Whether the open file still is what stands under the name."""
    try:
        return os.path.samestat(os.fstat(file), os.lstat(lock))
    except FileNotFoundError:
        return False


def _rename_only(part: Path, path: Path) -> None:
    if not part.is_dir() and sys.platform != "win32":
        try:
            # Unlike a rename, a link replaces nothing.
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:
            # A file system without links: a look before the rename is the best there is.
            pass
        else:
            part.unlink()
            return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "there is something by now", str(path))
    part.rename(path)


def _hidden(path: Path, middle: str, suffix: str = "") -> Path:
    return path / f".vsr.{middle}" if path.is_dir() else path.parent / f".{_short(path.stem)}.{middle}{suffix}"


def _short(name: str) -> str:
    stored = os.fsencode(name)
    return name if len(stored) <= _LONG else f"{name[:40]}-{hashlib.sha256(stored).hexdigest()[:16]}"


def _shown(folder: Path) -> bool:
    try:
        return any(not entry.name.startswith(".") for entry in folder.iterdir())
    except OSError as error:
        raise VideoError(f"folder '{folder}' cannot be read ({error.strerror}); choose another output") from error


def _identity(path: Path) -> object:
    """What is equal for two names of one file or folder; None where there is nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else path.resolve()


def _holds(output: Path, path: Path) -> VideoError:
    return VideoError(f"'{output}' holds the input '{path}', which an output folder may not; choose another folder")


def _in_the_way(path: Path, lock: Path, why: str) -> VideoError:
    return VideoError(f"'{lock}' is in the way of '{path}' ({why}); move it away or choose another output")
