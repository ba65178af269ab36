#!/usr/bin/env python3
"""Runs benchmarks and fails if one has become slower relative to a yardstick measured in the same run.

    make bench-check                                 # measures, compares with benches/baseline.json
    make bench-check BENCH_CHECK=--save              # measures, writes the ratios into that file
    make bench-check BENCH_CHECK="--save --missing"  # only the missing ratios
    python3 tools/check/bench_regression.py --criterion target/criterion    # checks existing results, runs nothing

Times of two machines, or of one on two days, cannot be compared; ratios of two times from one run can. The file lists, by
benchmark program, the benchmark (`id`), its yardstick (`over`: a copy of as many bytes, libtorch's own operation, a
pass of the network) and the recorded ratio. More than 15 % above that is a regression, unless the 95 % intervals of both
times allow less: then it is reported as unclear, and nothing fails. A benchmark that looks slower is measured again, up to
twice, and its lowest ratio counts: load makes times longer, never shorter.

A ratio that is null has not been measured. It could not detect a regression, so nothing is checked until all are measured.
Benchmarks are measured together with their yardstick, and --save rewrites the file after each yardstick, so an interruption
loses nothing that was measured before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASELINE = ROOT / "benches" / "baseline.json"
TOLERANCE, TRIES = 1.15, 3


class Problem(Exception):
    """An error message with its remedy."""


@dataclasses.dataclass
class Ratio:
    """A ratio of two times, with the smallest and the largest ratio within their intervals."""

    value: float
    low: float
    high: float


@dataclasses.dataclass
class Verdict:
    id: str
    over: str
    before: float
    now: Ratio

    @property
    def change(self) -> float:
        return self.now.value / self.before

    @property
    def word(self) -> str:
        if self.change > TOLERANCE:
            return "slower" if self.now.low > self.before * TOLERANCE else "unclear"
        return "faster" if self.change < 1 / TOLERANCE else "same"

    def line(self) -> str:
        now = f"{self.now.value:.3g} ({self.now.low:.3g}-{self.now.high:.3g})"
        return f"| {self.id} | {self.over} | {self.before:.3g} | {now} | {self.change:.2f} | {self.word} |"


def read_baseline(path: pathlib.Path) -> dict:
    try:
        baseline = json.loads(path.read_text())
        for pair in (pair for pairs in baseline["benches"].values() for pair in pairs):
            if not (isinstance(pair["id"], str) and isinstance(pair["over"], str)):
                raise Problem(f"{path}: `id` and `over` must be names of benchmarks, found {pair}")
            ratio = pair.setdefault("ratio", None)
            if not (ratio is None or ratio > 0):
                raise Problem(f"{path}: the ratio of `{pair['id']}` must be positive or null, found {ratio}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{path} is not a valid baseline: {type(error).__name__}: {error}") from error
    return baseline


def ensure_measured(path: pathlib.Path, benches: dict) -> None:
    pairs = [pair for pairs in benches.values() for pair in pairs]
    missing = [pair["id"] for pair in pairs if pair["ratio"] is None]
    if missing:
        raise Problem(
            f"{path} has no ratio for {len(missing)} of {len(pairs)} benchmarks (the first: `{missing[0]}`), so their regressions"
            ' would not be detected. On a quiet machine, measure them with `make bench-check BENCH_CHECK="--save --missing"`,'
            " or all with `make bench-check BENCH_CHECK=--save`."
        )


def by_yardstick(pairs: list[dict]) -> list[list[dict]]:
    groups: dict[str, list[dict]] = {}
    for pair in pairs:
        groups.setdefault(pair["over"], []).append(pair)
    return list(groups.values())


def measured(folder: pathlib.Path, since: float) -> dict[str, dict]:
    """Criterion's medians and their intervals in nanoseconds, by full name, measured since a time."""
    found = {}
    for path in folder.glob("**/new/benchmark.json"):
        estimates = path.with_name("estimates.json")
        if estimates.exists() and estimates.stat().st_mtime >= since:
            found[json.loads(path.read_text())["full_id"]] = json.loads(estimates.read_text())["median"]
    return found


def ratio_of(pair: dict, times: dict[str, dict]) -> Ratio:
    missing = [name for name in (pair["id"], pair["over"]) if name not in times]
    if missing:
        raise Problem(
            f"not measured: `{'`, `'.join(missing)}`. If a benchmark was renamed, rename it in {BASELINE.name} too."
        )
    own, yardstick = times[pair["id"]], times[pair["over"]]
    ends = [time["confidence_interval"] for time in (own, yardstick)]
    return Ratio(
        own["point_estimate"] / yardstick["point_estimate"],
        ends[0]["lower_bound"] / ends[1]["upper_bound"],
        ends[0]["upper_bound"] / ends[1]["lower_bound"],
    )


def judged(pairs: list[dict], times: dict[str, dict]) -> list[Verdict]:
    return [Verdict(pair["id"], pair["over"], pair["ratio"], ratio_of(pair, times)) for pair in pairs]


def run_bench(cargo: str, bench: str, pairs: list[dict]) -> None:
    names = sorted({name for pair in pairs for name in (pair["id"], pair["over"])})
    # Not re.escape, which escapes spaces as well.
    wanted = "^(" + "|".join(re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", name) for name in names) + ")$"
    # A tenth of criterion's resamples: they take longer than many of the benchmarks, and affect only the intervals.
    command = [*cargo.split(), "bench", "--workspace", "--bench", bench, "--", wanted, "--noplot", "--nresamples", "10000"]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        raise Problem(f"`{' '.join(command)}` failed")


def times_of(cargo: str, bench: str, pairs: list[dict], folder: pathlib.Path) -> dict[str, dict]:
    # Whole seconds are all that some file systems keep.
    started = time.time() - 2
    run_bench(cargo, bench, pairs)
    return measured(folder, started)


def lowest(first: Verdict, again: Verdict) -> Verdict:
    return again if again.now.value < first.now.value else first


def check(cargo: str, bench: str, pairs: list[dict], folder: pathlib.Path) -> list[Verdict]:
    """Measures what has one yardstick; what looks slower again."""
    verdicts: dict[str, Verdict] = {}
    wanted = pairs
    for _ in range(TRIES):
        for verdict in judged(wanted, times_of(cargo, bench, wanted, folder)):
            verdicts[verdict.id] = lowest(verdicts.get(verdict.id, verdict), verdict)
        wanted = [pair for pair in wanted if verdicts[pair["id"]].word in ("slower", "unclear")]
        if not wanted:
            break
    return list(verdicts.values())


def write(path: pathlib.Path, baseline: dict) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(baseline, indent=2) + "\n")
    aside.replace(path)


def report(verdicts: list[Verdict]) -> int:
    print("| benchmark | over | before | now (interval) | now / before | |\n|" + " --- |" * 6)
    for verdict in verdicts:
        print(verdict.line())
    counts = {word: sum(verdict.word == word for verdict in verdicts) for word in ("slower", "unclear", "faster")}
    print(f"\n{len(verdicts)} ratios: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    if counts["slower"]:
        print(f"error: {counts['slower']} more than {(TOLERANCE - 1) * 100:.0f} % above the baseline", file=sys.stderr)
    if counts["unclear"]:
        print("unclear: above the baseline, but not by more than the noise; measure again on a quiet machine")
    return 1 if counts["slower"] else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=pathlib.Path, default=BASELINE)
    parser.add_argument("--criterion", type=pathlib.Path, help="check the results that criterion wrote to this folder; run nothing")
    parser.add_argument("--save", action="store_true", help="write the measured ratios into the baseline")
    parser.add_argument("--missing", action="store_true", help="with --save: measure only the ratios that the baseline lacks")
    parser.add_argument("--only", help="only this benchmark program")
    parser.add_argument("--cargo", default=os.environ.get("CARGO", "cargo"))
    options = parser.parse_args(arguments)
    if options.missing and not options.save:
        parser.error("--missing requires --save")
    if options.save and options.criterion:
        parser.error("--save and --criterion cannot be combined: one measures, the other reads existing results")
    return options


def save_all(options: argparse.Namespace, baseline: dict, benches: dict, folder: pathlib.Path) -> int:
    count = 0
    for bench, pairs in benches.items():
        wanted = [pair for pair in pairs if pair["ratio"] is None or not options.missing]
        for group in by_yardstick(wanted):
            times = times_of(options.cargo, bench, group, folder)
            for pair, ratio in [(pair, ratio_of(pair, times)) for pair in group]:
                pair["ratio"] = float(f"{ratio.value:.4g}")
            write(options.baseline, baseline)
            count += len(group)
            print(f"{count} ratios written to {options.baseline}", flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    baseline = read_baseline(options.baseline)
    benches = {name: pairs for name, pairs in baseline["benches"].items() if options.only in (None, name)}
    if not benches:
        raise Problem(f"no benchmark program `{options.only}`; the programs are {', '.join(baseline['benches'])}")
    folder = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "criterion"
    if options.save:
        return save_all(options, baseline, benches, folder)
    ensure_measured(options.baseline, benches)
    if options.criterion:
        times = measured(options.criterion, since=0)
        return report([verdict for pairs in benches.values() for verdict in judged(pairs, times)])
    groups = [(name, group) for name, pairs in benches.items() for group in by_yardstick(pairs)]
    return report([verdict for name, group in groups for verdict in check(options.cargo, name, group, folder)])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the ratios reported as written are in the file")
