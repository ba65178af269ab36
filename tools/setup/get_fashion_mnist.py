#!/usr/bin/env python3
"""Puts Fashion-MNIST's four IDX files, decompressed, into the user's cache.

    python3 tools/setup/get_fashion_mnist.py            # download missing files
    python3 tools/setup/get_fashion_mnist.py --check    # only report whether they exist and are intact

Sources, in this order: the cache; the folder in DDIL_DATA (then nothing is ever downloaded); Debian's package
`dataset-fashion-mnist`, installed or unpacked here without root; the data set's own mirrors. Sources may compress
differently, so the checksums are those of the decompressed bytes.

The data set is by Zalando Research, under the MIT licence: https://github.com/zalandoresearch/fashion-mnist
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import pathlib
import shutil
import subprocess
import urllib.error
import urllib.request
import zlib

from ddil_cache import (
    CHUNK,
    Problem,
    cache_root,
    ensure_free_space,
    only_writer,
    run_tool,
    say,
    scratch_in,
    sha256_of,
)

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"
# Plain http is safe: the files are verified by the checksums above.
MIRRORS = [
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
]
NEEDED_MEGABYTES = 200


def faults(folder: pathlib.Path) -> list[str]:
    """The defects of the data in a folder, one phrase per file; empty if all four files are intact."""
    found = []
    for name, expected in SHA256.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif sha256_of(path) != expected:
            found.append(f"{name} has the wrong checksum")
    return found


def decompress(source: pathlib.Path, target: pathlib.Path) -> None:
    """Unpacks one `.gz` and verifies the result."""
    digest = hashlib.sha256()
    try:
        with gzip.open(source, "rb") as packed, open(target, "wb") as out:
            for chunk in iter(lambda: packed.read(CHUNK), b""):
                digest.update(chunk)
                out.write(chunk)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Problem(f"{source.name} is damaged ({error})") from error
    if digest.hexdigest() != SHA256[target.name]:
        raise Problem(f"{source.name} has the wrong checksum: {digest.hexdigest()} after decompression")


def take_from(packed: pathlib.Path, scratch: pathlib.Path, data: pathlib.Path) -> None:
    """Unpacks all four `.gz` files of a folder into a scratch folder, then moves them into place."""
    for name in SHA256:
        decompress(packed / f"{name}.gz", scratch / name)
    for name in SHA256:
        os.replace(scratch / name, data / name)


def has_packed_files(folder: pathlib.Path) -> bool:
    return all((folder / f"{name}.gz").is_file() for name in SHA256)


def from_disk(scratch: pathlib.Path, data: pathlib.Path) -> str:
    """`.gz` files that are already here: put into the cache by hand, or by an installed Debian package."""
    for folder in (data, pathlib.Path("/") / DEBIAN_FOLDER):
        if has_packed_files(folder):
            take_from(folder, scratch, data)
            return str(folder)
    raise Problem("no .gz files on this machine")


def from_debian(scratch: pathlib.Path, data: pathlib.Path) -> str:
    """Debian's package, downloaded and unpacked without installing it."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise Problem("this system has no apt-get")
    if not apt_download(scratch):
        if os.geteuid() != 0:
            raise Problem(f"apt-get found no {DEBIAN_PACKAGE} (its lists may be missing: `sudo apt-get update`)")
        say("apt's package lists may be missing: running apt-get update ...")
        apt(["update"], scratch)
        if not apt_download(scratch):
            raise Problem(f"apt-get found no {DEBIAN_PACKAGE}, not even after `apt-get update`")
    archive = next(scratch.glob("*.deb"))
    subprocess.run(["dpkg", "-x", str(archive), str(scratch / "deb")], check=True)
    take_from(scratch / "deb" / DEBIAN_FOLDER, scratch, data)
    return f"Debian's package {DEBIAN_PACKAGE}"


def apt_download(folder: pathlib.Path) -> bool:
    return apt(["download", DEBIAN_PACKAGE], folder) and any(folder.glob("*.deb"))


def apt(arguments: list[str], folder: pathlib.Path) -> bool:
    """Runs apt-get in a folder; true if it succeeded."""
    # As root, apt would download as the user `_apt`, without permission to write here.
    as_root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    command = ["apt-get", "-qq", *as_root, *arguments]
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def from_mirrors(scratch: pathlib.Path, data: pathlib.Path) -> str:
    """The files as the data set's authors publish them."""
    reasons = []
    for mirror in MIRRORS:
        try:
            for name in SHA256:
                download(f"{mirror}/{name}.gz", scratch / f"{name}.gz")
            take_from(scratch, scratch, data)
            return mirror
        except (OSError, Problem) as error:
            reasons.append(f"{mirror}: {getattr(error, 'reason', None) or error}")
    raise Problem("; ".join(reasons))


def download(url: str, target: pathlib.Path) -> None:
    with urllib.request.urlopen(url, timeout=60) as response, open(target, "wb") as out:
        shutil.copyfileobj(response, out, CHUNK)


def fetch(data: pathlib.Path) -> str:
    """Fills the folder from the first source that has intact files, and names it."""
    ensure_free_space(data, NEEDED_MEGABYTES)
    reasons = []
    for source in (from_disk, from_debian, from_mirrors):
        with scratch_in(data) as scratch:
            try:
                return source(scratch, data)
            except (Problem, subprocess.CalledProcessError) as error:
                reasons.append(str(error))
    raise Problem(
        f"Fashion-MNIST could not be downloaded. Tried: {'; '.join(reasons)}. Get its four .gz files in any way, put them "
        f"into {data}, and run this again; or set DDIL_DATA to a folder with the four decompressed files."
    )


def check(folder: pathlib.Path, cure: str) -> None:
    found = faults(folder)
    if found:
        raise Problem(f"Fashion-MNIST in {folder} is not usable: {', '.join(found)}. {cure}")
    say(f"Fashion-MNIST: {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check; download nothing")
    arguments = parser.parse_args()

    own = os.environ.get("DDIL_DATA")
    if own:
        check(pathlib.Path(own), "DDIL_DATA points there: put the decompressed IDX files into it, or unset DDIL_DATA.")
        return

    data = cache_root() / "datasets" / "fashion-mnist"
    if arguments.check:
        check(data, "Run `make setup`.")
        return
    with only_writer(data):
        if faults(data):
            say(f"downloading Fashion-MNIST into {data} ...")
            say(f"source: {fetch(data)}")
        check(data, "Run `make setup` again.")


if __name__ == "__main__":
    run_tool(main)
