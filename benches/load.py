#!/usr/bin/env python3
"""Measures a program on libtorch's threads while other work runs on the same processors.

    make bench-load                                           # builds ddil, then runs this
    python3 benches/load.py                                   # samples 200 images in 8 guided steps with target/release/ddil
    python3 benches/load.py --variant GOMP_SPINCOUNT=1000 --variant OMP_WAIT_POLICY=passive
    python3 benches/load.py --rounds 5 --hogs 4 --threads 2 -- PROGRAM ARGUMENTS   # any other program

Each variant is a set of environment variables; `asis` is the program with none of them, which adapts by itself, and
`libgomp` (GOMP_SPINCOUNT=300000) is libgomp's default. They alternate, first idle, then with `--hogs` busy loops, for
`--rounds` rounds; medians of the wall time are printed.

- idle: ratio to the fastest variant's idle time of the same rounds.
- loaded: ratio to the fair share, which is the fastest idle time times (threads + hogs) / processors.

The exit code is 1 if `asis` costs more than --max-idle or --max-loaded. Other work on the machine distorts the idle
column: the load average at the start is printed, and it should be far below 1.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LIBGOMP = "GOMP_SPINCOUNT=300000"
HOG = "while True: pass"


def default_program(folder: str) -> list[str]:
    teacher = str(ROOT / "assets" / "fashion-mnist-teacher")
    drawn = ["-n", "200", "--steps", "8", "--guidance-scale", "3", "--seed", "0", "-o", f"{folder}/samples.png"]
    return [str(TARGET / "release" / "ddil"), "sample", teacher, *drawn]


def environment(variant: str, threads: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in SPINNING}
    settings = {"asis": "", "libgomp": LIBGOMP}.get(variant, variant)
    return {**kept, "OMP_NUM_THREADS": str(threads), **dict(pair.split("=", 1) for pair in settings.split(",") if pair)}


class Busy:
    """Busy loops during a measurement; on the same processors, if --processors chooses some."""

    def __init__(self, count: int, pinned: list[str]) -> None:
        self.command, self.count = [*pinned, sys.executable, "-c", HOG], count

    def __enter__(self) -> None:
        self.loops = [subprocess.Popen(self.command) for _ in range(self.count)]
        time.sleep(0.3)

    def __exit__(self, *_: object) -> None:
        for loop in self.loops:
            loop.kill()
        for loop in self.loops:
            loop.wait()


def seconds(command: list[str], variables: dict[str, str]) -> float:
    begun = time.perf_counter()
    outcome = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if outcome.returncode != 0:
        sys.exit(f"error: {' '.join(command)} ended with {outcome.returncode}:\n{outcome.stdout}")
    return time.perf_counter() - begun


def measure(options: argparse.Namespace, variants: list[str], command: list[str], pinned: list[str]) -> dict[str, dict[str, list[float]]]:
    times = {variant: {"idle": [], "loaded": []} for variant in variants}
    for state, hogs in (("idle", 0), ("loaded", options.hogs)):
        with Busy(hogs, pinned):
            for number in range(options.rounds):
                # The first variant rotates, so that none is always the first.
                order = variants[number % len(variants) :] + variants[: number % len(variants)]
                for variant in order:
                    times[variant][state].append(seconds([*pinned, *command], environment(variant, options.threads)))
                print(f"{state}, round {number + 1}:", ", ".join(f"{v} {times[v][state][-1]:.2f} s" for v in variants), flush=True)
    return times


def report(options: argparse.Namespace, times: dict[str, dict[str, list[float]]], processors: int) -> int:
    medians = {variant: {state: statistics.median(values) for state, values in states.items()} for variant, states in times.items()}
    fastest = min(medians[variant]["idle"] for variant in medians)
    share = fastest * max(1.0, (options.threads + options.hogs) / processors)
    print(f"\n{options.threads} threads, {options.hogs} busy loops, {processors} processors, {options.rounds} rounds; fair share {share:.1f} s\n")
    print("| variant | idle, s | over the fastest | loaded, s | over the fair share |\n| --- | --- | --- | --- | --- |")
    for variant, states in medians.items():
        print(f"| {variant} | {states['idle']:.2f} | {states['idle'] / fastest:.3f} | {states['loaded']:.1f} | {states['loaded'] / share:.2f} |")
    idle, loaded = medians["asis"]["idle"] / fastest, medians["asis"]["loaded"] / share
    if idle > options.max_idle or loaded > options.max_loaded:
        print(f"error: asis costs {idle:.3f} idle and {loaded:.2f} loaded; at most {options.max_idle} and {options.max_loaded}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", help="NAME=VALUE[,NAME=VALUE], may be repeated (default: libgomp)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hogs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processors", help="run everything on these processors only, in taskset's notation: 0,1 (default: all)")
    parser.add_argument("--max-idle", type=float, default=1.02)
    parser.add_argument("--max-loaded", type=float, default=1.3)
    parser.add_argument("program", nargs="*", help="after --: another program")
    options = parser.parse_args()
    pinned = ["taskset", "-c", options.processors] if options.processors else []
    processors = len(os.sched_getaffinity(0))
    if options.processors:
        processors = int(subprocess.run([*pinned, "nproc"], stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(f"load average at the start: {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        command = options.program or default_program(folder)
        times = measure(options, ["asis", *(options.variant or ["libgomp"])], command, pinned)
    return report(options, times, processors)


if __name__ == "__main__":
    sys.exit(main())
