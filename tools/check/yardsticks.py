#!/usr/bin/env python3
"""Measures how the sources are cut: circles of imports, size of the public API, sizes of crates and functions.

    python3 tools/check/yardsticks.py                 # a table; exit code 1 if files or crates import each other
    python3 tools/check/yardsticks.py --details       # with the edges of each circle, crates, and longest functions
    python3 tools/check/yardsticks.py --root CHECKOUT # another checkout

How each is counted:

- A file imports another if it names an item of it by `crate::..` or `super::..`, in a `use` or elsewhere. Names that a
  module re-exports lead to the file that defines them. A re-export alone (`pub use`) imports nothing, a module may call
  its own child modules (`child::..`), and tests are left out. A circle is a strongly connected component of more than
  one file.
- Source lines have code on them: blank lines, comments and tests are left out. C++ is counted the same way.
- Public items are everything after `pub` without a restriction, fields too, except `pub use` and `pub mod`.
- A function's lines go from its signature to its closing brace; tests are left out.
- A public type has an example if its documentation, or that of one of its methods, has a code block.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import statistics
import sys
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Comments and literals, in the order in which they have to be tried. Nested block comments are not used here.
TOKENS = re.compile(
    r"""
    //[^\n]*                                        # line comments, documentation too
  | /\*.*?\*/                                       # block comments
  | (?<![A-Za-z0-9_])b?r(\#*)".*?"\1                # raw strings
  | b?"(?:\\.|[^"\\])*"                             # strings
  | b?'(?:\\(?:u\{[^}]*\}|x..|.)|[^'\\])'           # characters, not lifetimes
    """,
    re.DOTALL | re.VERBOSE,
)
TEST_ATTRIBUTE = re.compile(r"#\[cfg\((?!not)[^\]]*\btest\b[^\]]*\)\]")
MODULE = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))? )?mod (\w+)\s*;", re.MULTILINE)
USE = re.compile(r"^[ \t]*(pub(?:\([^)]*\))? )?use ([^;]+);", re.MULTILINE)
PATH = re.compile(r"(?<![\w:])(?:crate|super)(?:::\w+)+")
FUNCTION = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))? )?(?:const |async |unsafe |extern \"[^\"]*\" )*fn (\w+)", re.MULTILINE)
PUBLIC = re.compile(r"^[ \t]*pub (?!use |mod )", re.MULTILINE)
TYPE = re.compile(r"^pub (?:struct|enum|trait|union) (\w+)")
IMPLEMENTATION = re.compile(r"^impl(?:<[^{]*?>)? (\w+)(?:<[^{]*>)?(?: where[^{]*)? \{")


def blanked(text: str) -> str:
    """Rust or C++ without comments and literals, on the same lines."""
    return TOKENS.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def end_of_item(code: str, begin: int) -> int:
    """Where the item that starts at `begin` ends: after its braces, or after a semicolon before any."""
    depth = 0
    for match in re.finditer(r"[{}();\[\]]", code[begin:]):
        bracket = match[0]
        if bracket in "{([":
            depth += 1
        elif bracket in "})]":
            depth -= 1
        if depth == 0 and bracket in "};":
            return begin + match.end()
    return len(code)


def without_tests(code: str) -> str:
    while found := TEST_ATTRIBUTE.search(code):
        # Past the attribute itself, whose brackets are balanced.
        end = end_of_item(code, found.end())
        code = code[: found.start()] + re.sub(r"[^\n]", " ", code[found.start() : end]) + code[end:]
    return code


def leaves(tree: str) -> list[list[str]]:
    """`a::{b, c::{self, d as e}}` as the paths a::b, a::c, a::c::d."""
    tree = tree.strip()
    opening = tree.find("{")
    if opening < 0:
        path = [part for part in tree.split(" as ")[0].strip().split("::") if part]
        return [path[:-1] if path and path[-1] == "self" and len(path) > 1 else path]
    prefix = [part for part in tree[:opening].strip().split("::") if part]
    inner, parts, depth, begin = tree[opening + 1 : tree.rfind("}")], [], 0, 0
    for position, letter in enumerate(inner):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append(inner[begin:position])
            begin = position + 1
    parts.append(inner[begin:])
    found = [prefix + (leaf if leaf != ["self"] else []) for part in parts if part.strip() for leaf in leaves(part)]
    return found


@dataclass
class Module:
    """One file of a crate."""

    path: tuple[str, ...]
    file: pathlib.Path
    text: str
    code: str
    children: list[str] = field(default_factory=list)
    # An imported name and its path; only those visible to others.
    exports: dict[str, list[str]] = field(default_factory=dict)


class Crate:
    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.modules: dict[tuple[str, ...], Module] = {}
        for root in ("lib.rs", "main.rs"):
            if (folder / "src" / root).exists():
                self.read((root,) if root == "main.rs" else (), folder / "src" / root, folder / "src")

    def read(self, path: tuple[str, ...], file: pathlib.Path, beside: pathlib.Path) -> None:
        text = file.read_text()
        code = without_tests(blanked(text))
        module = self.modules[path] = Module(path, file, text, code, MODULE.findall(code))
        for public, tree in USE.findall(code):
            for leaf in leaves(tree):
                if leaf and public:
                    module.exports[leaf[-1]] = leaf
        for child in module.children:
            for candidate, folder in ((beside / f"{child}.rs", beside / child), (beside / child / "mod.rs", beside / child)):
                if candidate.exists():
                    self.read((*path, child), candidate, folder)

    def absolute(self, module: Module, path: list[str]) -> tuple[tuple[str, ...], list[str]] | None:
        """The module that a path starts from and the rest of the path; nothing for other crates' paths."""
        base = module.path
        if path[0] == "crate":
            return (("main.rs",) if base[:1] == ("main.rs",) else ()), path[1:]
        if path[0] in ("super", "self"):
            rest = path[1:] if path[0] == "self" else path
            while rest and rest[0] == "super":
                base, rest = base[:-1], rest[1:]
            return base, rest
        return (base, path) if path[0] in module.children else None

    def definition(self, start: tuple[str, ...], rest: list[str], depth: int = 0) -> tuple[str, ...] | None:
        """The file that defines what a path names."""
        if start not in self.modules or depth > 8:
            return None
        while rest and (*start, rest[0]) in self.modules:
            start, rest = (*start, rest[0]), rest[1:]
        module = self.modules[start]
        if rest and rest[0] in module.exports:
            target = self.absolute(module, module.exports[rest[0]])
            return self.definition(target[0], target[1] + rest[1:], depth + 1) if target else None
        return start

    def imports(self, module: Module) -> dict[tuple[str, ...], str]:
        """The files of the crate that this one needs, and by which path."""
        needed: dict[tuple[str, ...], str] = {}
        uses = [(public, leaf) for public, tree in USE.findall(module.code) for leaf in leaves(tree) if leaf]
        body = USE.sub("", module.code)
        named = [path.split("::") for path in PATH.findall(body)]
        for public, leaf in uses:
            # A facade re-exports names that it does not use itself.
            if not public or re.search(rf"\b{re.escape(leaf[-1])}\b", body):
                named.append(leaf if leaf[-1] != "*" else leaf[:-1])
        for path in named:
            outside = path and path[0] in ("crate", "super")
            target = self.absolute(module, path) if outside else None
            found = self.definition(*target) if target else None
            if found is not None and found != module.path:
                needed.setdefault(found, "::".join(path))
        return needed

    def edges(self) -> dict[tuple[str, ...], dict[tuple[str, ...], str]]:
        return {path: self.imports(module) for path, module in self.modules.items()}


def circles(edges: dict) -> list[list]:
    """Strongly connected components of more than one node."""
    def reachable(start) -> set:
        seen, waiting = set(), [start]
        while waiting:
            for target in edges.get(waiting.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        return seen

    reach = {node: reachable(node) for node in edges}
    left, found = set(edges), []
    for node in edges:
        if node in left:
            circle = [other for other in edges if other == node or (other in reach[node] and node in reach.get(other, ()))]
            left -= set(circle)
            if len(circle) > 1:
                found.append(sorted(circle))
    return found


def crate_edges(folders: list[pathlib.Path]) -> dict[str, list[str]]:
    """What each crate depends on among the others, in `[dependencies]` and `[build-dependencies]`."""
    names = {folder.name for folder in folders}
    edges: dict[str, list[str]] = {}
    for folder in folders:
        table, edges[folder.name] = "", []
        for line in (folder / "Cargo.toml").read_text().splitlines():
            if line.startswith("["):
                table = line.strip("[]").split(".")[0]
            name = re.match(r"([\w-]+)\s*[.=]", line)
            if table in ("dependencies", "build-dependencies") and name and name[1] in names and name[1] != folder.name:
                edges[folder.name].append(name[1])
    return edges


def lines_of_code(code: str) -> int:
    return sum(1 for line in code.splitlines() if line.strip())


def functions(module: Module) -> list[tuple[int, str]]:
    found = []
    for match in FUNCTION.finditer(module.code):
        begin = match.end(1)
        end = end_of_item(module.code, begin)
        # A declaration in a trait has no body.
        if "{" in module.code[begin:end]:
            first = module.code.count("\n", 0, match.start(1))
            found.append((module.code.count("\n", 0, end) - first + 1, f"{module.file.name}: {match[1]}"))
    return found


def documented_types(modules: list[Module]) -> tuple[set[str], set[str]]:
    """All public types, and those of them that have an example."""
    types, shown = set(), set()
    for module in modules:
        owner, documentation = None, []
        code = module.code.splitlines()
        for number, line in enumerate(module.text.splitlines()):
            stripped = line.strip()
            if stripped.startswith("///"):
                documentation.append(stripped)
                continue
            if stripped.startswith("#[") or not stripped:
                continue
            kept = code[number] if number < len(code) else ""
            example = any("```" in entry for entry in documentation)
            if found := TYPE.match(kept):
                types.add(found[1])
                shown |= {found[1]} if example else set()
            elif found := IMPLEMENTATION.match(kept):
                owner = found[1]
            elif kept.startswith("}"):
                owner = None
            elif owner and example and kept.strip().startswith("pub "):
                shown.add(owner)
            documentation = []
    return types, shown & types


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def name(path: tuple[str, ...]) -> str:
    return "::".join(path) or "lib.rs"


def measure(root: pathlib.Path, details: bool) -> int:
    folders = sorted(path.parent for path in (root / "crates").glob("*/Cargo.toml"))
    crates = [Crate(folder) for folder in folders]
    modules = [module for crate in crates for module in crate.modules.values()]
    sizes = {crate.folder.name: sum(lines_of_code(m.code) for m in crate.modules.values()) for crate in crates}
    shim = [file for folder in folders for file in sorted(folder.glob("cpp/*")) if file.suffix in (".cpp", ".h")]
    rust, cpp = sum(sizes.values()), sum(lines_of_code(blanked(file.read_text())) for file in shim)
    largest = max(sizes, key=lambda crate: sizes[crate])
    public = sum(len(PUBLIC.findall(module.code)) for module in modules)
    lengths = [entry for module in modules for entry in functions(module)]
    counts = [length for length, _ in lengths]
    types, shown = documented_types(modules)
    of_files = [(crate.folder.name, circle, crate.edges()) for crate in crates for circle in circles(crate.edges())]
    of_crates = circles(crate_edges(folders))

    rows = [
        ("circles of files", f"{len(of_files)}"),
        ("circles of crates", f"{len(of_crates)}"),
        ("public items per 1000 lines", f"{1000 * public / rust:.0f}"),
        ("largest crate's share of source", f"{100 * sizes[largest] / rust:.0f} % ({largest})"),
        ("source lines, Rust + C++", f"{rust} + {cpp}"),
        ("lines a function, median / p90 / max", f"{statistics.median(counts):.0f} / {percentile(counts, 0.9)} / {max(counts)}"),
        ("public types with an example", f"{100 * len(shown) / len(types):.0f} % ({len(shown)} of {len(types)})"),
    ]
    width = max(len(title) for title, _ in rows)
    for title, value in rows:
        print(f"| {title:{width}} | {value} |")
    if details:
        print("\nsource lines:", ", ".join(f"{crate} {size}" for crate, size in sizes.items()))
        print("longest functions:", ", ".join(f"{what} ({length})" for length, what in sorted(lengths, reverse=True)[:8]))
        print("public types without an example:", ", ".join(sorted(types - shown)))
    for crate, circle, edges in of_files:
        print(f"error: files of {crate} import each other: {', '.join(map(name, circle))}", file=sys.stderr)
        for file in circle:
            for target, path in edges[file].items():
                if target in circle:
                    print(f"  {name(file)} needs {name(target)} by `{path}`", file=sys.stderr)
    for circle in of_crates:
        print(f"error: crates depend on each other: {', '.join(circle)}", file=sys.stderr)
    return 1 if of_files or of_crates else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="a checkout (default: this one)")
    parser.add_argument("--details", action="store_true", help="also crates, longest functions, types without an example")
    arguments = parser.parse_args()
    return measure(arguments.root, arguments.details)


if __name__ == "__main__":
    sys.exit(main())
