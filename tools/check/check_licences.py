#!/usr/bin/env python3
"""Checks that every package of a build has a licence that deny.toml allows and comes from a registry that it allows, and
that every minified library in the sources has one that it allows, in a file beside it.

    python3 tools/check/check_licences.py [--metadata FILE]

No network is used: `cargo metadata` reads Cargo.lock. Packages present in two versions are listed, which is not an error.
Advisories are not checked; `cargo deny check advisories` does so with the RustSec database.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLATFORM = "x86_64-unknown-linux-gnu"


def main() -> int:
    arguments = parse_arguments()
    rules = arguments.rules.read_text(encoding="utf-8")
    allowed, registries = list_in(rules, "allow"), list_in(rules, "allow-registry")
    packages = read_packages(arguments.metadata)
    problems = [problem for package in packages for problem in problems_of(package, allowed, registries)]
    embedded = sorted(arguments.sources.glob("*/src/**/*.min.js"))
    problems += [problem for library in embedded for problem in problems_of_embedded(library, allowed)]
    for line in duplicates(packages):
        print(f"note: {line}")
    if problems:
        count = len(packages) + len(embedded)
        print(f"error: {len(problems)} of {count} packages are not as {arguments.rules.name} allows:", file=sys.stderr)
        print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
        return 1
    print(f"{len(packages)} packages have licences that {arguments.rules.name} allows and come from its registries")
    print(f"{len(embedded)} files of embedded libraries have such licences beside them")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata", type=pathlib.Path, help="the output of `cargo metadata`; default: run it")
    parser.add_argument("--rules", type=pathlib.Path, default=ROOT / "deny.toml", help="default: deny.toml")
    parser.add_argument("--sources", type=pathlib.Path, default=ROOT / "crates", help="with embedded libraries; default: crates")
    return parser.parse_args()


def list_in(rules: str, key: str) -> set[str]:
    """A list of strings in a TOML file; the standard library reads TOML only since Python 3.11."""
    found = re.search(rf"^{re.escape(key)} = \[(.*?)\]", rules, re.MULTILINE | re.DOTALL)
    if not found:
        raise SystemExit(f"error: the rules have no list `{key}`")
    return set(re.findall(r'"([^"]*)"', found.group(1)))


def read_packages(metadata: pathlib.Path | None) -> list[dict]:
    if metadata:
        text = metadata.read_text(encoding="utf-8")
    else:
        cargo = os.environ.get("CARGO", "cargo")
        command = [cargo, "metadata", "--format-version", "1", "--locked", "--filter-platform", PLATFORM]
        outcome = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if outcome.returncode != 0:
            raise SystemExit("error: `cargo metadata` failed; its output is above")
        text = outcome.stdout
    return json.loads(text)["packages"]


def problems_of(package: dict, allowed: set[str], registries: set[str]) -> list[str]:
    name = f"{package['name']} {package['version']}"
    problems = []
    licence = package.get("license")
    if not licence:
        problems.append(f"{name}: declares no licence")
    elif not is_allowed(licence, allowed):
        problems.append(f"{name}: {licence}")
    source = package.get("source")
    # A package without a source is one of the workspace.
    if source and source not in {f"registry+{registry}" for registry in registries}:
        problems.append(f"{name}: comes from {source}")
    return problems


# A sentence that identifies each licence.
TEXTS = {
    "MIT": "Permission is hereby granted, free of charge, to any person obtaining a copy",
    "Unlicense": "This is free and unencumbered software released into the public domain.",
}


def problems_of_embedded(library: pathlib.Path, allowed: set[str]) -> list[str]:
    """`sortable.a11y.min.js` belongs to the library `sortable`, whose licence is in `sortable.LICENSE`."""
    licence = library.with_name(library.name.split(".")[0] + ".LICENSE")
    if not licence.is_file():
        return [f"{library}: there is no {licence.name} beside it"]
    text = " ".join(licence.read_text(encoding="utf-8").split())
    found = [name for name, sentence in TEXTS.items() if sentence in text]
    if not found:
        return [f"{licence}: the licence was not recognised"]
    return [f"{licence}: {name}" for name in found if name not in allowed]


def is_allowed(licence: str, allowed: set[str]) -> bool:
    """Whether an SPDX expression can be met: one side of each OR, both of each AND."""
    # Before SPDX, a slash was a choice.
    words = re.findall(r"[()]|[^\s()]+", licence.replace("/", " OR "))
    is_met, rest = either(words, allowed)
    return is_met and not rest


def either(words: list[str], allowed: set[str]) -> tuple[bool, list[str]]:
    is_met, rest = both(words, allowed)
    while rest[:1] == ["OR"]:
        other, rest = both(rest[1:], allowed)
        is_met = is_met or other
    return is_met, rest


def both(words: list[str], allowed: set[str]) -> tuple[bool, list[str]]:
    is_met, rest = one(words, allowed)
    while rest[:1] == ["AND"]:
        other, rest = one(rest[1:], allowed)
        is_met = is_met and other
    return is_met, rest


def one(words: list[str], allowed: set[str]) -> tuple[bool, list[str]]:
    if words[:1] == ["("]:
        is_met, rest = either(words[1:], allowed)
        return (is_met, rest[1:]) if rest[:1] == [")"] else (False, rest)
    if words[1:2] == ["WITH"]:
        return " ".join(words[:3]) in allowed, words[3:]
    return bool(words) and words[0] in allowed, words[1:]


def duplicates(packages: list[dict]) -> list[str]:
    versions = collections.defaultdict(set)
    for package in packages:
        versions[package["name"]].add(package["version"])
    return [f"{name} is built in {len(all_of)} versions: {', '.join(sorted(all_of))}" for name, all_of in sorted(versions.items()) if len(all_of) > 1]


if __name__ == "__main__":
    sys.exit(main())
