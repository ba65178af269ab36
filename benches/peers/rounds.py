"""What the comparisons share: this project's program and Python take turns, round by round."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What ddil_libtorch::keep_freed_pages sets.
TUNABLES = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4611686018427387904:glibc.malloc.top_pad=67108864"


def add_options(parser, rounds):
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--same-malloc", action="store_true", help="Python keeps freed memory too")


def same_malloc():
    """Starts Python anew with the allocator's settings, if it has others."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.argv])


def built(example):
    """This project's program."""
    command = ["cargo", "build", "--release", "-q", "--workspace", "--example", example]
    subprocess.run(command, cwd=ROOT, check=True)
    target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    return pathlib.Path(target) / "release" / "examples" / example


class Program:
    """A program that answers each line of its input with a line."""

    def __init__(self, *command):
        environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        command = [str(part) for part in command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def round(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
