"""Shared by the set-up tools: the cache folder, its lock, and errors that state the remedy.

Only the standard library of Python 3.8 is used, so that nothing has to be installed first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
import textwrap
from typing import Callable, Iterator

CHUNK = 1 << 22


class Problem(Exception):
    """An error for the user: one paragraph that includes the remedy."""


def cache_root() -> pathlib.Path:
    """The user's cache: `$DDIL_CACHE`, else `$XDG_CACHE_HOME/ddil`, else `~/.cache/ddil`."""
    own = os.environ.get("DDIL_CACHE")
    if own:
        return pathlib.Path(own).expanduser().absolute()
    # The XDG specification requires that a relative XDG_CACHE_HOME is ignored.
    xdg = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or ".")
    return (xdg if xdg.is_absolute() else pathlib.Path.home() / ".cache") / "ddil"


def sha256_of(path: pathlib.Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def make_folder(path: pathlib.Path) -> None:
    """Creates a folder and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(
            f"Cannot create the folder {path}: {error.strerror}. Set DDIL_CACHE to a folder you can write to."
        ) from error


def ensure_free_space(folder: pathlib.Path, megabytes: int) -> None:
    """Raises an error if the disk is too full."""
    free = shutil.disk_usage(folder).free // 1_000_000
    if free < megabytes:
        raise Problem(
            f"{folder} has {free} MB of free space, but unpacking needs {megabytes} MB. "
            "Free some space, or set DDIL_CACHE to a folder on a larger disk."
        )


@contextlib.contextmanager
def only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock. The kernel releases it when the process ends, however it ends."""
    make_folder(folder)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is filling {folder} ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch_in(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder on the same file system, so that what is built there can be renamed into place.

    Call it under `only_writer`: leftovers of an earlier, killed run are removed first.
    """
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    path = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def say(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(line, flush=True)


def run_tool(main: Callable[[], None]) -> None:
    """Runs a tool: exit code 1 and one paragraph on stderr after a `Problem` or a disk error."""
    try:
        main()
    except Problem as problem:
        text = textwrap.fill(str(problem), width=100, break_long_words=False, break_on_hyphens=False)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; incomplete files were removed", file=sys.stderr)
        sys.exit(130)
