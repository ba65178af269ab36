#!/usr/bin/env python3
"""Checks what `cargo package` wrote: each crate has a README, the licence and every source that its build needs.

    python3 tools/check/packages.py [--folder target/package]

Links must have become files: a package that contains a link does not build after unpacking.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
import tarfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def problems_of(crate: pathlib.Path, archive: pathlib.Path) -> list[str]:
    if not archive.exists():
        return [f"{archive.name} was not written"]
    with tarfile.open(archive) as package:
        members = {member.name.split("/", 1)[1]: member for member in package.getmembers()}
    wanted = {"README.md", "LICENSE"} | {
        str(path.relative_to(crate))
        for folder in ("src", "cpp", "assets", "presets")
        for path in (crate / folder).rglob("*")
        if path.is_file()
    }
    if (crate / "build.rs").exists():
        wanted.add("build.rs")
    problems = [f"{name} is missing" for name in sorted(wanted - members.keys())]
    problems += [f"{name} is a link" for name, member in members.items() if not member.isfile()]
    problems += [f"{name} is empty" for name in ("README.md", "LICENSE") if name in members and not members[name].size]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "target" / "package")
    options = parser.parse_args()
    version = re.search(r'^version = "([^"]+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    failed = 0
    for crate in sorted(path.parent for path in (ROOT / "crates").glob("*/Cargo.toml")):
        archive = options.folder / f"{crate.name}-{version}.crate"
        problems = problems_of(crate, archive)
        for problem in problems:
            print(f"error: {archive.name}: {problem}", file=sys.stderr)
        failed += bool(problems)
        if not problems:
            print(f"{archive.name}: {archive.stat().st_size / 1000:.0f} kB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
