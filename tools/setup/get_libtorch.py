#!/usr/bin/env python3
"""Provides the libtorch that this workspace is built with, in `.libtorch` next to Cargo.toml.

    python3 tools/setup/get_libtorch.py            # download it if necessary
    python3 tools/setup/get_libtorch.py --check    # only report which libtorch a build would use, and whether it is usable

Your own libtorch takes precedence: if LIBTORCH or LIBTORCH_USE_PYTORCH is set, that one is checked and nothing is
downloaded. Otherwise pip downloads PyTorch's wheel and two small CUDA wheels that it links to, verified by checksum;
headers, three libraries and licences are unpacked into the user's cache, nothing is installed, and `.libtorch` is a
link to it. With DDIL_CUDA=1 a libtorch without CUDA is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import zipfile

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

VERSION = "2.13.0"  # tch 0.26 requires exactly this version
NAME = f"{VERSION}-cpu"
CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
LINK = CHECKOUT / ".libtorch"
CURE = (
    f"Unset it to let this project download libtorch {VERSION}, or run `pip install torch=={VERSION}` in a virtual environment "
    "and set LIBTORCH_USE_PYTORCH=1 while it is active."
)
CUDA_CURE = (
    f"Run `pip install torch=={VERSION}` (a CUDA build) in a virtual environment and set LIBTORCH_USE_PYTORCH=1 while it is "
    f"active, or set LIBTORCH to the folder of a CUDA build of libtorch {VERSION}."
)

# libtorch_cpu.so of the wheel links to libcudart and libcupti, even without a GPU.
WHEELS = {
    "torch==2.13.0": "60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7",
    "nvidia-cuda-runtime==13.0.96": "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    "nvidia-cuda-cupti==13.0.85": "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
}
# Fixed, so that any Python can download them: no part of the wheels that depends on Python is kept.
WHEEL_TAGS = [
    *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none"),
    *("--platform", "manylinux_2_28_x86_64"),
    *("--platform", "manylinux_2_25_x86_64"),
    *("--platform", "manylinux2014_x86_64"),
]
# The libraries that are kept from the wheels.
LIBRARIES = {
    "torch/lib/libtorch_cpu.so": "096eed6e217377ccda4d50693b680e2771709c01f58fe52717835b017fed9c58",
    "torch/lib/libc10.so": "b83ea50e9171c7e3455c19f9ff2c7d21d457a7b8231e9c4ea1b6e032ae1156d5",
    "torch/lib/libgomp.so.1": "e28fb2896a3d612b46a27d7f8ef840d34c9efbc29b70a044c42095fb94856890",
    "nvidia/cu13/lib/libcudart.so.13": "96c42e418cec19054186b9429c321603cc190bf26a18104e19408117a2a817b0",
    "nvidia/cu13/lib/libcupti.so.13": "e2f9ed861fe27c492b8bb52b5e3220ef5120f3edcda36312e96b7fd8a186be3e",
}
# Of the path and size of every file, see `listing_digest`.
LISTING_SHA256 = "692225dec735a4211871eadc617a8eb3ac47c7f612106cd6d60b35346f6da022"
NEEDED_MEGABYTES = 1300


# The user's own libtorch.


def wants_cuda() -> bool:
    return os.environ.get("DDIL_CUDA", "0") not in ("", "0")


def version_in(torch: pathlib.Path) -> str | None:
    """The version of a libtorch folder, from the first file that contains it; builds differ in where it is."""
    build_version = torch / "build-version"
    if build_version.is_file():
        return build_version.read_text().strip()
    python_version = torch / "version.py"
    if python_version.is_file():
        found = re.search(r"^__version__ = '([^']+)'", python_version.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    header = torch / "include" / "torch" / "headeronly" / "version.h"
    if header.is_file():
        parts = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
        return ".".join(parts.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    return None


def ensure_version(found: str | None, where: str, cure: str) -> None:
    if found is None:
        raise Problem(f"{where} does not look like a libtorch: it has no build-version, version.py or version.h. {cure}")
    if found.split("+")[0] == VERSION:
        return
    # torch-sys reads this variable too.
    if "LIBTORCH_BYPASS_VERSION_CHECK" in os.environ:
        say(f"warning: {where} is libtorch {found}, not {VERSION}; LIBTORCH_BYPASS_VERSION_CHECK allows it")
        return
    raise Problem(f"{where} is libtorch {found}, but tch 0.26 can only be built against {VERSION}. {cure}")


def ensure_libraries(lib: pathlib.Path, where: str, cure: str) -> None:
    if not (lib / "libtorch_cpu.so").is_file():
        raise Problem(f"{where}: {lib} has no libtorch_cpu.so. {cure}")
    if wants_cuda() and not (lib / "libtorch_cuda.so").is_file():
        raise Problem(
            f"DDIL_CUDA is set, but {where} is a CPU-only libtorch: {lib} has no libtorch_cuda.so. {CUDA_CURE}"
        )


def describe(version: str | None, where: str, lib: pathlib.Path) -> None:
    kind = "with CUDA" if (lib / "libtorch_cuda.so").is_file() else "CPU only"
    say(f"libtorch {version} ({kind}): {where}")


def check_folder(torch: pathlib.Path, lib: pathlib.Path, where: str, cure: str) -> None:
    version = version_in(torch)
    ensure_version(version, where, cure)
    ensure_libraries(lib, where, cure)
    describe(version, where, lib)


def check_own_folder() -> None:
    """LIBTORCH, and LIBTORCH_LIB if the libraries are elsewhere, as torch-sys reads them."""
    value = os.environ["LIBTORCH"]
    torch = pathlib.Path(value)
    if not (torch.is_absolute() and torch.is_dir()):
        raise Problem(f"LIBTORCH is {value!r}; expected the absolute path of an existing folder. {CURE}")
    lib = pathlib.Path(os.environ.get("LIBTORCH_LIB", torch)) / "lib"
    check_folder(torch, lib, f"LIBTORCH={torch}", CURE)


def check_own_python() -> None:
    """LIBTORCH_USE_PYTORCH: the torch of the interpreter that torch-sys will run."""
    python = "python" if "VIRTUAL_ENV" in os.environ else "python3"
    where = f"LIBTORCH_USE_PYTORCH is set, which uses the torch of `{python}`"
    program = "import os, torch; print(torch.__version__); print(os.path.dirname(torch.__file__))"
    try:
        answer = subprocess.run([python, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        raise Problem(f"{where}, but there is no such program in PATH. {CURE}") from error
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Problem(f"{where}, but that could not import torch ({reason}). {CURE}")
    version, folder = answer.stdout.split("\n")[:2]
    ensure_version(version, f"{where}, which", CURE)
    lib = pathlib.Path(folder) / "lib"
    ensure_libraries(lib, f"the torch of `{python}`", CURE)
    describe(version, f"the torch of `{python}` in {folder}", lib)


# The libtorch in the cache.


def listing_digest(folder: pathlib.Path) -> str:
    """A digest of the names and lengths of all files; the libraries also have checksums of their contents."""
    lines = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = pathlib.Path(parent, name)
            lines.append(f"{path.relative_to(folder).as_posix()} {path.lstat().st_size}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def fault(folder: pathlib.Path) -> str | None:
    """A defect of the libtorch in the cache, if there is one."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    for name, expected in LIBRARIES.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256_of(path) != expected:
            return f"{path} has the wrong checksum"
    if listing_digest(folder) != LISTING_SHA256:
        return f"files in {folder} are missing, added or of the wrong length"
    return None


def place_of(member: str) -> str | None:
    """Where a file of a wheel is unpacked to, or None if it is not."""
    if member in LIBRARIES or member.startswith("torch/include/"):
        return member
    if member.endswith(("/LICENSE", "/NOTICE")) or "licenses/" in member:
        return "licenses/" + member.replace("/", "__")
    return None


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            place = place_of(member.filename)
            if place is None or member.is_dir():
                continue
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, CHUNK)


def ensure_platform() -> None:
    machine, (libc, libc_version) = platform.machine(), platform.libc_ver()
    if not (sys.platform == "linux" and machine == "x86_64" and libc == "glibc"):
        raise Problem(
            f"This script can download libtorch for Linux on x86_64 with glibc; this is {sys.platform} on {machine}"
            f"{'' if libc else ' without glibc'}. Run `pip install torch=={VERSION}` in a virtual environment and set "
            f"LIBTORCH_USE_PYTORCH=1 while it is active, or set LIBTORCH to the folder of a libtorch {VERSION} built for "
            "this machine. This project is not tested on such machines."
        )
    if tuple(map(int, libc_version.split(".")[:2])) < (2, 28):
        raise Problem(
            f"PyTorch's wheels require glibc 2.28 or newer; this system has {libc_version}. Use a newer system, or build "
            f"libtorch {VERSION} here and set LIBTORCH to its folder."
        )


def ensure_pip() -> None:
    probe = [sys.executable, "-m", "pip", "--version"]
    if subprocess.run(probe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
        raise Problem(
            f"{sys.executable} has no pip, which this script uses to download libtorch. Install it (Debian, Ubuntu: `sudo apt-get install "
            "python3-pip`; elsewhere: `python3 -m ensurepip --user`), or set LIBTORCH to the folder of your own libtorch "
            f"{VERSION}."
        )


def download(wheels: pathlib.Path) -> None:
    """Downloads the wheels with the user's own pip, so that proxies and mirrors set up for it are used."""
    wheels.mkdir()
    requirements = wheels / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in WHEELS.items()))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    # pip's own cache would keep another half gigabyte of files that are never used again.
    command += ["--no-cache-dir", "--disable-pip-version-check", *WHEEL_TAGS]
    command += ["--dest", str(wheels), "--requirement", str(requirements)]
    if not sys.stdout.isatty():
        command += ["--quiet"]
    # pip writes aside first, and /tmp may be small; no environment is needed to download.
    environment = {**os.environ, "TMPDIR": str(wheels), "PIP_REQUIRE_VIRTUALENV": "0"}
    outcome = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if outcome.returncode != 0:
        raise download_problem(outcome.stderr)


def download_problem(output: str) -> Problem:
    """Summarises pip's many lines in one paragraph."""
    if "DO NOT MATCH THE HASHES" in output:
        return Problem(
            "A downloaded wheel does not have the checksum in tools/setup/get_libtorch.py and was deleted: the download was "
            "damaged, or pip uses a mirror whose files differ from PyPI's. Run this again; if it fails again, check "
            "`python3 -m pip config list`."
        )
    # With --quiet, "from versions: none" is all that pip prints about an index that does not respond.
    offline = ("from versions: none", "NewConnectionError", "name resolution", "Timeout", "ProxyError", "unreachable")
    last = (output.strip().splitlines() or ["no reason given"])[-1]
    if any(word in output for word in offline):
        return Problem(
            f"The package index could not be reached, and libtorch {VERSION} is not in the cache yet (540 MB, once). "
            "Connect to the network or set pip's proxy (https_proxy), and run this again; or copy "
            f"{cache_root()}/libtorch/{NAME} from another machine. pip's last line: {last}"
        )
    return Problem(f"pip could not download libtorch {VERSION}. Its last line: {last}")


def build(scratch: pathlib.Path) -> pathlib.Path:
    """Builds the whole folder in a scratch folder, verifies it and returns it."""
    download(scratch / "wheels")
    folder = scratch / NAME
    for wheel in sorted((scratch / "wheels").glob("*.whl")):
        unpack(wheel, folder)
    # torch-sys links to `-ltorch`; the wheel's own libtorch.so requires the CUDA libraries, which are not unpacked.
    (folder / "torch" / "lib" / "libtorch.so").symlink_to("libtorch_cpu.so")
    # The wheel lacks this file, in which torch-sys looks for the version.
    (folder / "torch" / "build-version").write_text(f"{VERSION}+cpu\n")
    wrong = fault(folder)
    if wrong:
        raise Problem(f"The unpacked libtorch is not the expected one: {wrong}. Please report this.")
    return folder


def fetch(folder: pathlib.Path) -> None:
    ensure_platform()
    with only_writer(folder.parent):
        wrong = fault(folder)
        if wrong is None:
            return
        say(f"libtorch: {wrong}")
        ensure_pip()
        ensure_free_space(folder.parent, NEEDED_MEGABYTES)
        say(f"downloading libtorch {VERSION} (540 MB; 490 MB when unpacked) ...")
        with scratch_in(folder.parent) as scratch:
            built = build(scratch)
            if folder.exists():
                folder.rename(scratch / "damaged")
            built.rename(folder)


def point_link_to(folder: pathlib.Path) -> None:
    """Makes `.libtorch` a link to the cache, atomically."""
    if LINK.is_symlink() and pathlib.Path(os.readlink(LINK)) == folder:
        return
    aside = LINK.with_name(f".libtorch.{os.getpid()}")
    aside.symlink_to(folder)
    os.replace(aside, LINK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check; neither download nor change anything")
    arguments = parser.parse_args()

    # In the order of torch-sys, which ignores the value of the first variable.
    if "LIBTORCH_USE_PYTORCH" in os.environ:
        return check_own_python()
    if "LIBTORCH" in os.environ:
        return check_own_folder()
    cure = f"Remove {LINK} and run `make setup`."
    if LINK.is_dir() and not LINK.is_symlink():
        return check_folder(LINK / "torch", LINK / "torch" / "lib", str(LINK), cure)

    folder = cache_root() / "libtorch" / NAME
    if wants_cuda():
        raise Problem(f"DDIL_CUDA is set, but the libtorch that this script downloads is CPU-only. {CUDA_CURE}")
    if arguments.check:
        wrong = fault(LINK)
        if wrong:
            raise Problem(f"libtorch: {wrong}. Run `make setup`.")
    else:
        fetch(folder)
        point_link_to(folder)
    check_folder(LINK / "torch", LINK / "torch" / "lib", str(LINK), cure)


if __name__ == "__main__":
    run_tool(main)
