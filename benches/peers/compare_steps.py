#!/usr/bin/env python3
"""Sets this project's sampler steps against diffusers', both in one run, round by round in turn.

    python benches/peers/compare_steps.py [--threads N] [--rounds N] [--best] [--same-malloc]

Builds benches/step_times.rs with cargo. Needs a Python with torch and diffusers (the versions of
tools/record/record_schedulers.py). Prints medians in microseconds and, in brackets, how many times faster than diffusers. --best takes each side's fastest
round instead, for a machine with other work on it.

This project's program keeps freed memory, as all of its programs do; Python returns it to the system. --same-malloc
tells Python's allocator the same.
"""

import argparse
import json
import statistics

import rounds

WAYS = ("general", "plan", "plan in place")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rounds.add_options(parser, 25)
    parser.add_argument("--best", action="store_true")
    options = parser.parse_args()
    if options.same_malloc:
        rounds.same_malloc()
    ours_built = rounds.built("step_times")
    from diffusers_step import Rounds

    theirs = Rounds(options.threads)
    with rounds.Program(ours_built, options.threads) as ours:
        pairs = [(theirs.run(), json.loads(ours.round())) for _ in range(options.rounds)]

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
