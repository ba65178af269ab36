"""Shared parts of the comparisons: this project's program and Python alternate, round by round."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The settings of ddil_libtorch::keep_freed_pages.
TUNABLES = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4611686018427387904:glibc.malloc.top_pad=67108864"


def add_options(parser, rounds):
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--same-malloc", action="store_true", help="Python keeps freed memory too")


def same_malloc():
    """Restarts Python with these allocator settings, if it has others."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.argv])


def built(example, profile="release"):
    """This project's program."""
    command = ["cargo", "build", "--profile", profile, "-q", "--workspace", "--example", example]
    subprocess.run(command, cwd=ROOT, check=True)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / ("debug" if profile == "dev" else profile) / "examples" / example


class Program:
    """A program that responds to each line of its input with a line."""

    def __init__(self, *command, settings=None):
        self.command = [str(part) for part in command]
        environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"} | (settings or {})
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def line(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise SystemExit(f"error: exit code {code} before a response: {' '.join(self.command)}")
        return line

    def round(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.line()

    def processor_seconds(self):
        """Processor time of all its threads so far."""
        seconds = 0.0
        for task in pathlib.Path(f"/proc/{self.process.pid}/task").iterdir():
            seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
        return seconds

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
