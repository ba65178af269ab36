#!/usr/bin/env python3
"""Compares samples of four steps with the same loop of diffusers in one run, in alternating rounds.

    python benches/peers/compare_sampling.py [--threads N] [--rounds N] [--best] [--same-malloc] [--before PROGRAM]

The network costs nothing on both sides: only the sampler is timed. Builds benches/sampling_times.rs with cargo. Needs a
Python with torch and diffusers (`make bench-peers` creates one). Prints medians in microseconds per sample and, in brackets,
how many times faster than diffusers. --best takes each side's fastest round instead, for a machine with other work on it;
--before adds an earlier build of sampling_times as a third side.

This project's program keeps freed memory, as all of its programs do; Python returns it to the system. --same-malloc
makes Python's allocator keep it too.
"""

import argparse
import contextlib
import json
import statistics

import rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rounds.add_options(parser, 25)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--before", metavar="PROGRAM")
    options = parser.parse_args()
    if options.same_malloc:
        rounds.same_malloc()
    programs = {"before": options.before} if options.before else {}
    programs["ours"] = rounds.built("sampling_times")
    from diffusers_sampling import Rounds

    theirs = Rounds(options.threads)
    recorded = []
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(rounds.Program(path, options.threads)) for name, path in programs.items()}
        for _ in range(options.rounds):
            times = {name: json.loads(side.round()) for name, side in sides.items()}
            recorded.append({"diffusers": theirs.run()} | times)

    middle, name = (min, "best") if options.best else (statistics.median, "median")
    print(f"{options.threads} thread(s), {name} of {options.rounds} rounds, microseconds per sample of four steps")
    print(f"{'':44}{'diffusers':>12}" + "".join(f"{side:>22}" for side in sides))
    for case in recorded[0]["ours"]:
        peers = [times["diffusers"][case] for times in recorded if case in times["diffusers"]]
        cells = f"{middle(peers):12.1f}" if peers else " " * 12
        for side in sides:
            time = middle(times[side][case] for times in recorded)
            cells += f"{time:13.1f} ({middle(peers) / time:5.1f}x)" if peers else f"{time:13.1f}" + " " * 9
        print(f"{case:44}{cells}")


if __name__ == "__main__":
    main()
