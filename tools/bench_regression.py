#!/usr/bin/env python3
"""Runs benchmarks and fails if one has become slower against a yardstick that is measured in the same run.

    make bench-check                                 # measures, compares with benches/baseline.json
    make bench-check BENCH_CHECK=--save              # measures, writes the ratios into that file
    python3 tools/bench_regression.py --criterion target/criterion    # judges what is there, runs nothing

Times of two machines, or of one on two days, cannot be compared; ratios of two times from one run can. The file lists, by
benchmark program, what is measured (`id`), its yardstick (`over`: a copy of as many bytes, libtorch's own operation, a
pass of the network) and the ratio that was once measured. More than 15 % above that is a regression, unless the 95 %
intervals of both times leave room for less: then it is said, and nothing fails. What looks slower is measured again, up to
twice, and its lowest ratio counts: load makes times longer, never shorter. A ratio that is null has not been measured.
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

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASELINE = ROOT / "benches" / "baseline.json"
TOLERANCE, TRIES = 1.15, 3


class Problem(Exception):
    """What is wrong, and what to do."""


@dataclasses.dataclass
class Ratio:
    """A ratio of two times, and the ends between which it lies with them inside their intervals."""

    value: float
    low: float
    high: float


@dataclasses.dataclass
class Verdict:
    id: str
    over: str
    before: float | None
    now: Ratio

    @property
    def change(self) -> float | None:
        return None if self.before is None else self.now.value / self.before

    @property
    def word(self) -> str:
        if self.change is None:
            return "new"
        if self.change > TOLERANCE:
            return "slower" if self.now.low > self.before * TOLERANCE else "unclear"
        return "faster" if self.change < 1 / TOLERANCE else "same"

    def line(self) -> str:
        before = "-" if self.before is None else f"{self.before:.3g}"
        change = "-" if self.change is None else f"{self.change:.2f}"
        now = f"{self.now.value:.3g} ({self.now.low:.3g}-{self.now.high:.3g})"
        return f"| {self.id} | {self.over} | {before} | {now} | {change} | {self.word} |"


def read_baseline(path: pathlib.Path) -> dict:
    try:
        baseline = json.loads(path.read_text())
        for pair in (pair for pairs in baseline["benches"].values() for pair in pairs):
            if not (isinstance(pair["id"], str) and isinstance(pair["over"], str)):
                raise Problem(f"{path}: `id` and `over` must be names of benchmarks, found {pair}")
            if not (pair["ratio"] is None or pair["ratio"] > 0):
                raise Problem(f"{path}: the ratio of `{pair['id']}` must be positive or null, found {pair['ratio']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{path} is no baseline: {type(error).__name__}: {error}") from error
    return baseline


def measured(folder: pathlib.Path, since: float) -> dict[str, dict]:
    """Criterion's medians and their intervals in nanoseconds, by full name, of what was measured since."""
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
            f"not measured: `{'`, `'.join(missing)}`. Was the benchmark renamed? Then rename it in {BASELINE.name} too."
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
    # Not re.escape: what it does to a space is Python's own.
    wanted = "^(" + "|".join(re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", name) for name in names) + ")$"
    command = [*cargo.split(), "bench", "--workspace", "--bench", bench, "--", wanted]
    if subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        raise Problem(f"`{' '.join(command)}` failed")


def lowest(first: Verdict, again: Verdict) -> Verdict:
    return again if again.now.value < first.now.value else first


def measure(cargo: str, bench: str, pairs: list[dict], folder: pathlib.Path, saving: bool) -> list[Verdict]:
    """Runs a benchmark program; what looks slower runs again."""
    verdicts: dict[str, Verdict] = {}
    wanted = pairs
    for _ in range(1 if saving else TRIES):
        # Whole seconds are all that some file systems keep.
        started = time.time() - 2
        run_bench(cargo, bench, wanted)
        for verdict in judged(wanted, measured(folder, started)):
            verdicts[verdict.id] = lowest(verdicts.get(verdict.id, verdict), verdict)
        wanted = [pair for pair in wanted if verdicts[pair["id"]].word in ("slower", "unclear")]
        if not wanted:
            break
    return list(verdicts.values())


def save(path: pathlib.Path, baseline: dict, verdicts: list[Verdict]) -> None:
    ratios = {(verdict.id, verdict.over): verdict.now.value for verdict in verdicts}
    for pair in (pair for pairs in baseline["benches"].values() for pair in pairs):
        pair["ratio"] = float(f"{ratios[pair['id'], pair['over']]:.4g}")
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(baseline, indent=2) + "\n")
    aside.replace(path)


def report(verdicts: list[Verdict]) -> int:
    print("| benchmark | over | before | now (interval) | now / before | |\n|" + " --- |" * 6)
    for verdict in verdicts:
        print(verdict.line())
    counts = {word: sum(verdict.word == word for verdict in verdicts) for word in ("slower", "unclear", "faster", "new")}
    print(f"\n{len(verdicts)} ratios: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    if counts["slower"]:
        print(f"error: {counts['slower']} more than {(TOLERANCE - 1) * 100:.0f} % above the baseline", file=sys.stderr)
    if counts["unclear"]:
        print("unclear: above the baseline, but not by more than the noise; measure again on a quiet machine")
    if counts["new"]:
        print("new: not in the baseline yet; `make bench-check BENCH_CHECK=--save` on a quiet machine writes them")
    return 1 if counts["slower"] else 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=pathlib.Path, default=BASELINE)
    parser.add_argument("--criterion", type=pathlib.Path, help="judge what criterion has left in this folder; run nothing")
    parser.add_argument("--save", action="store_true", help="write what is measured into the baseline")
    parser.add_argument("--only", help="this benchmark program alone")
    parser.add_argument("--cargo", default=os.environ.get("CARGO", "cargo"))
    options = parser.parse_args(arguments)
    if options.save and options.only:
        parser.error("--save writes all ratios, --only measures some")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    baseline = read_baseline(options.baseline)
    benches = {name: pairs for name, pairs in baseline["benches"].items() if options.only in (None, name)}
    if not benches:
        raise Problem(f"no benchmark program `{options.only}`; there are {', '.join(baseline['benches'])}")
    if options.criterion:
        times = measured(options.criterion, since=0)
        verdicts = [verdict for pairs in benches.values() for verdict in judged(pairs, times)]
    else:
        folder = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "criterion"
        verdicts = [
            verdict
            for name, pairs in benches.items()
            for verdict in measure(options.cargo, name, pairs, folder, options.save)
        ]
    if options.save:
        save(options.baseline, baseline, verdicts)
        print(f"{len(verdicts)} ratios written to {options.baseline}")
        return 0
    return report(verdicts)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Problem as problem:
        sys.exit(f"error: {problem}")
