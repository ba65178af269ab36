#!/usr/bin/env python3
"""Sets this project's sampler steps against diffusers', both in one run, round by round in turn.

    python benches/peers/compare_steps.py [--threads N] [--rounds N] [--best] [--same-malloc]

Builds benches/step_times.rs with cargo. Needs a Python with torch and diffusers (the versions of
tools/record_schedulers.py). Prints medians in microseconds and, in brackets, how many times faster than diffusers. --best takes each side's fastest
round instead, for a machine with other work on it.

This project's program keeps freed memory, as all of its programs do; Python returns it to the system. --same-malloc
tells Python's allocator the same.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
WAYS = ("general", "plan", "plan in place")
# What ddil_libtorch::keep_freed_pages sets.
TUNABLES = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4611686018427387904:glibc.malloc.top_pad=67108864"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--same-malloc", action="store_true")
    return parser.parse_args()


def built():
    command = ["cargo", "build", "--release", "-q", "--workspace", "--example", "step_times"]
    subprocess.run(command, cwd=ROOT, check=True)
    target = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    return pathlib.Path(target) / "release" / "examples" / "step_times"


def one_round(program):
    program.stdin.write("\n")
    program.stdin.flush()
    return json.loads(program.stdout.readline())


def main():
    options = arguments()
    if options.same_malloc and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.argv])
    ours_built = built()
    from diffusers_step import Rounds

    theirs = Rounds(options.threads)
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    program = subprocess.Popen(
        [ours_built, str(options.threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    pairs = [(theirs.run(), one_round(program)) for _ in range(options.rounds)]
    program.stdin.close()
    program.wait()

    middle, name = (min, "best") if options.best else (statistics.median, "median")
    print(f"{options.threads} thread(s), {name} of {options.rounds} rounds, microseconds a step")
    print(f"{'':28}{'diffusers':>12}" + "".join(f"{way:>22}" for way in WAYS))
    for case in pairs[0][0]:
        peer = middle(theirs[case] for theirs, _ in pairs)
        ours = [middle(ours[f"{case} | {way}"] for _, ours in pairs) for way in WAYS]
        cells = "".join(f"{time:13.1f} ({peer / time:5.1f}x)" for time in ours)
        print(f"{case:28}{peer:12.1f}{cells}")


if __name__ == "__main__":
    main()
