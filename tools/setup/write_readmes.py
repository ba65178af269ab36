#!/usr/bin/env python3
"""Writes each crate's README.md from its crate documentation, so that the two cannot differ.

    python3 tools/setup/write_readmes.py            # writes crates/*/README.md
    python3 tools/setup/write_readmes.py --check    # exit code 1 if one is not what this would write

A README has the documentation up to its first heading, its first example, and the lines that a dependent needs.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

LIBTORCH = """\
## Use

```toml
[dependencies]
{name} = "{version}"

[build-dependencies]
ddil-build = "{version}"
```

```rust
// build.rs: programs that use this crate find libtorch when they start
fn main() {{
    ddil_build::link();
}}
```

Builds require libtorch 2.13.0, for tch 0.26, which this crate re-exports as `tch`. Choose one:

- `LIBTORCH=/absolute/path/to/libtorch`, the folder that contains `lib/` and `include/`
- `LIBTORCH_USE_PYTORCH=1`, while a Python environment with torch 2.13.0 is active
- the feature `download-libtorch`

A C++17 compiler is required as well. Without libtorch the build fails at once and lists these ways.
"""

PLAIN = """\
## Use

```toml
[dependencies]
{name} = "{version}"
```
"""

PROGRAM = """\
## Install

```sh
LIBTORCH=/absolute/path/to/libtorch cargo install {name}
```

Builds require libtorch 2.13.0 and a C++17 compiler. `LIBTORCH_USE_PYTORCH=1`, while a Python environment with torch 2.13.0
is active, replaces `LIBTORCH`; so does `--features download-libtorch`, where the downloaded library lies in cargo's build
folder and has to stay there.
"""

FOOT = """
A crate of ddil. [Documentation](https://docs.rs/{name}). Licence: [Apache-2.0](LICENSE).
"""


def documentation(crate: pathlib.Path) -> list[str]:
    """The lines of the crate documentation, without their marks."""
    root = crate / "src" / "lib.rs"
    source = (root if root.exists() else crate / "src" / "main.rs").read_text().splitlines()
    return [line[3:].removeprefix(" ") for line in source if line.startswith("//!")]


def introduction(lines: list[str]) -> str:
    end = next((i for i, line in enumerate(lines) if line.startswith("# ")), len(lines))
    text = "\n".join(lines[:end]).strip()
    # Links between items mean nothing outside of rustdoc.
    text = re.sub(r"\[(`[^`\]]+`)\](?:\([^)]*\))?", r"\1", text)
    return re.sub(r"^\[`[^`]+`\]: .*$", "", text, flags=re.MULTILINE)


def example(lines: list[str]) -> str:
    """The first block of Rust after a heading `# Example`, without its hidden lines."""
    begin = next((i for i, line in enumerate(lines) if re.match(r"# Examples?$", line)), None)
    if begin is None:
        return ""
    end = next((i for i in range(begin + 1, len(lines)) if lines[i].startswith("# ") and not in_block(lines, i)), len(lines))
    section = lines[begin + 1 : end]
    fences = [i for i, line in enumerate(section) if line.startswith("```")]
    if len(fences) < 2:
        return ""
    code = [line for line in section[fences[0] + 1 : fences[1]] if line != "#" and not line.startswith("# ")]
    before = "\n".join(section[: fences[0]]).strip()
    shown = re.sub(r"\[(`[^`\]]+`)\](?:\([^)]*\))?", r"\1", before)
    return "\n".join(["## Example\n", *([shown + "\n"] if shown else []), "```rust", *tidy(code), "```"]) + "\n"


def tidy(code: list[str]) -> list[str]:
    """Without the blank lines that hidden lines leave at both ends."""
    while code and not code[0]:
        code = code[1:]
    while code and not code[-1]:
        code = code[:-1]
    return code


def in_block(lines: list[str], position: int) -> bool:
    return sum(line.startswith("```") for line in lines[:position]) % 2 == 1


def readme(crate: pathlib.Path, version: str) -> str:
    lines = documentation(crate)
    manifest = (crate / "Cargo.toml").read_text()
    name = re.search(r'^name = "([^"]+)"', manifest, re.MULTILINE)[1]
    use = PLAIN
    if "download-libtorch" in manifest and name != "ddil-build":
        use = PROGRAM if (crate / "src" / "main.rs").exists() else LIBTORCH
    parts = [f"# {name}\n", introduction(lines) + "\n"]
    if name != "ddil-build":
        parts += [example(lines), use.format(name=name, version=version)]
    else:
        # Short enough to be there as a whole.
        whole = [f"#{line}" if line.startswith("# ") and not in_block(lines, i) else line for i, line in enumerate(lines)]
        parts[1] = introduction(whole).replace("```no_run", "```rust") + "\n"
    return "\n".join(part for part in parts if part) + FOOT.format(name=name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would be written")
    options = parser.parse_args()
    full = re.search(r'^version = "([^"]+)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    stale = []
    for manifest in sorted((ROOT / "crates").glob("*/Cargo.toml")):
        path, text = manifest.parent / "README.md", readme(manifest.parent, ".".join(full.split(".")[:2]))
        if not path.exists() or path.read_text() != text:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(text)
    if options.check and stale:
        print(f"error: not up to date: {', '.join(stale)}. Run python3 tools/setup/write_readmes.py.", file=sys.stderr)
        return 1
    print("written: " + ", ".join(stale) if stale else "every README.md is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
