#!/usr/bin/env python3
"""Tests of the tools: their errors, and that an error leaves everything unchanged. No network is used, nothing is timed."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

TOOLS = pathlib.Path(__file__).resolve().parent
sys.path += [str(TOOLS / "setup"), str(TOOLS / "check"), str(TOOLS.parent / "benches" / "peers")]

import bench_peers
import bench_regression
import check_licences
import ddil_cache
import get_fashion_mnist
import rounds

OURS = ("LIBTORCH", "LIBTORCH_USE_PYTORCH", "LIBTORCH_LIB", "LIBTORCH_BYPASS_VERSION_CHECK", "DDIL_CUDA", "DDIL_DATA")
LABELS = "t10k-labels-idx1-ubyte"


class ToolTest(unittest.TestCase):
    def setUp(self) -> None:
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = pathlib.Path(holder.name)

    def run_tool(self, name: str, *arguments: str, **settings: str) -> tuple[int, str]:
        """Exit code and what was printed, with line breaks undone."""
        environment = {key: value for key, value in os.environ.items() if key not in OURS}
        environment.update(DDIL_CACHE=str(self.folder / "cache"), **settings)
        outcome = subprocess.run(
            [sys.executable, str(TOOLS / name), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return outcome.returncode, " ".join(outcome.stdout.split())

    def assert_refused(self, outcome: tuple[int, str], *phrases: str) -> None:
        code, said = outcome
        self.assertEqual(code, 1, said)
        self.assertNotIn("Traceback", said)
        for phrase in phrases:
            self.assertIn(phrase, said)


class GetLibtorch(ToolTest):
    def make_libtorch(self, version: str, *libraries: str) -> str:
        torch = self.folder / "torch"
        (torch / "lib").mkdir(parents=True)
        (torch / "build-version").write_text(version + "\n")
        for library in libraries:
            (torch / "lib" / library).touch()
        return str(torch)

    def test_takes_the_users_own(self) -> None:
        own = self.make_libtorch("2.13.0+cu130", "libtorch_cpu.so", "libtorch_cuda.so")
        code, said = self.run_tool("setup/get_libtorch.py", LIBTORCH=own, DDIL_CUDA="1")
        self.assertEqual(code, 0, said)
        self.assertIn("2.13.0+cu130 (with CUDA)", said)
        self.assertFalse((self.folder / "cache").exists())

    def test_reads_the_version_of_an_installed_torch(self) -> None:
        own = self.make_libtorch("", "libtorch_cpu.so")
        os.remove(os.path.join(own, "build-version"))
        pathlib.Path(own, "version.py").write_text("from typing import Optional\n__version__ = '2.14.1+cpu'\n")
        self.assert_refused(self.run_tool("setup/get_libtorch.py", LIBTORCH=own), "2.14.1+cpu")

    def test_refuses_another_version(self) -> None:
        own = self.make_libtorch("2.12.0+cpu", "libtorch_cpu.so")
        self.assert_refused(self.run_tool("setup/get_libtorch.py", LIBTORCH=own), "2.12.0+cpu", "2.13.0", "pip install")

    def test_refuses_a_folder_without_the_library(self) -> None:
        own = self.make_libtorch("2.13.0+cpu")
        self.assert_refused(self.run_tool("setup/get_libtorch.py", LIBTORCH=own), "has no libtorch_cpu.so")

    def test_refuses_what_is_no_libtorch(self) -> None:
        self.assert_refused(self.run_tool("setup/get_libtorch.py", LIBTORCH=str(self.folder)), "does not look like a libtorch")

    def test_refuses_a_path_that_torch_sys_would_misread(self) -> None:
        for value in ("", "relative/torch", str(self.folder / "absent")):
            self.assert_refused(self.run_tool("setup/get_libtorch.py", LIBTORCH=value), "absolute path", repr(value))

    def test_refuses_cpu_only_where_cuda_was_asked_for(self) -> None:
        own = self.make_libtorch("2.13.0+cpu", "libtorch_cpu.so")
        self.assert_refused(self.run_tool("setup/get_libtorch.py", LIBTORCH=own, DDIL_CUDA="1"), "CPU-only", "pip install")

    def test_refuses_a_python_without_torch(self) -> None:
        empty = {"LIBTORCH_USE_PYTORCH": "1", "PATH": str(self.folder)}
        self.assert_refused(self.run_tool("setup/get_libtorch.py", **empty), "no such program")


class GetFashionMnist(ToolTest):
    def test_check_downloads_nothing(self) -> None:
        self.assert_refused(self.run_tool("setup/get_fashion_mnist.py", "--check"), "is missing", "make setup")
        self.assertFalse((self.folder / "cache").exists())

    def test_a_folder_of_the_users_own_is_never_filled(self) -> None:
        outcome = self.run_tool("setup/get_fashion_mnist.py", DDIL_DATA=str(self.folder))
        self.assert_refused(outcome, "DDIL_DATA", "train-images-idx3-ubyte is missing")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_names_a_damaged_file(self) -> None:
        (self.folder / LABELS).write_bytes(b"\0\0\x08\x01")
        outcome = self.run_tool("setup/get_fashion_mnist.py", DDIL_DATA=str(self.folder))
        self.assert_refused(outcome, f"{LABELS} has the wrong checksum")


class CheckLicences(ToolTest):
    def check(self, **package: object) -> tuple[int, str]:
        metadata = self.folder / "metadata.json"
        whole = {"name": "a", "version": "1.0.0", "license": "MIT", "source": None, **package}
        metadata.write_text(json.dumps({"packages": [whole]}))
        return self.run_tool("check/check_licences.py", "--metadata", str(metadata))

    def test_expressions_are_met(self) -> None:
        allowed = {"MIT", "Zlib", "Apache-2.0 WITH LLVM-exception"}
        for licence in ("MIT", "MIT OR GPL-3.0", "GPL-3.0/MIT", "(GPL-3.0 OR MIT) AND Zlib", "Apache-2.0 WITH LLVM-exception"):
            self.assertTrue(check_licences.is_allowed(licence, allowed), licence)
        for licence in ("", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR GPL-3.0", "MIT Zlib", "Apache-2.0", "GPL-3.0 AND (MIT OR Zlib)"):
            self.assertFalse(check_licences.is_allowed(licence, allowed), licence)

    def test_takes_what_is_allowed(self) -> None:
        code, said = self.check()
        self.assertEqual(code, 0, said)
        self.assertIn("1 packages have licences", said)

    def test_refuses_what_is_not(self) -> None:
        self.assert_refused(self.check(license="GPL-3.0-only"), "a 1.0.0: GPL-3.0-only", "deny.toml")
        self.assert_refused(self.check(license=None), "a 1.0.0: declares no licence")
        self.assert_refused(self.check(source="git+https://example.org/a"), "comes from git+https://example.org/a")

    def test_embedded_libraries_have_a_licence(self) -> None:
        library = self.folder / "plot.min.js"
        self.assertIn("no plot.LICENSE beside it", check_licences.problems_of_embedded(library, {"MIT"})[0])
        licence = self.folder / "plot.LICENSE"
        licence.write_text("All rights reserved.")
        self.assertIn("not recognised", check_licences.problems_of_embedded(library, {"MIT"})[0])
        licence.write_text(check_licences.TEXTS["MIT"].replace(" any ", "\nany "))
        self.assertEqual(check_licences.problems_of_embedded(library, {"MIT"}), [])
        self.assertEqual(check_licences.problems_of_embedded(library, {"Zlib"}), [f"{licence}: MIT"])


class Decompress(ToolTest):
    """Files from any source go through this one gate."""

    def decompress(self, packed: bytes) -> str:
        """What is said about such a file."""
        source = self.folder / f"{LABELS}.gz"
        source.write_bytes(packed)
        with self.assertRaises(ddil_cache.Problem) as refusal:
            get_fashion_mnist.decompress(source, self.folder / LABELS)
        return str(refusal.exception)

    def test_refuses_other_bytes(self) -> None:
        self.assertIn("wrong checksum", self.decompress(gzip.compress(b"something else")))

    def test_refuses_a_cut_file(self) -> None:
        self.assertIn("is damaged", self.decompress(gzip.compress(os.urandom(10_000))[:-100]))

    def test_refuses_a_page_of_text(self) -> None:
        self.assertIn("is damaged", self.decompress(b"<html>moved</html>"))


class BenchRegression(ToolTest):
    """On figures that are made up: `own` over `yardstick` was once 2."""

    def setUp(self) -> None:
        super().setUp()
        self.baseline = self.folder / "baseline.json"
        self.write_baseline([{"id": "group/own", "over": "group/yardstick", "ratio": 2.0}])

    def write_baseline(self, pairs: list) -> None:
        self.baseline.write_text(json.dumps({"benches": {"some": pairs}}))

    def measure(self, own: float, noise: float = 0.01, name: str = "group/own") -> None:
        """What criterion leaves behind."""
        for full_id, time in ((name, own), ("group/yardstick", 1.0)):
            folder = self.folder / "target" / "criterion" / full_id / "new"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "benchmark.json").write_text(json.dumps({"full_id": full_id}))
            interval = {"lower_bound": time * (1 - noise), "upper_bound": time * (1 + noise)}
            median = {"point_estimate": time, "confidence_interval": interval}
            (folder / "estimates.json").write_text(json.dumps({"median": median}))

    def judge(self, *arguments: str) -> tuple[int, str]:
        criterion = str(self.folder / "target" / "criterion")
        return self.run_tool("check/bench_regression.py", "--baseline", str(self.baseline), "--criterion", criterion, *arguments)

    def run_with_cargo(self, *times: float, **settings: str) -> tuple[int, str]:
        """The whole tool, with a cargo that measures these times, one a run."""
        cargo = self.folder / "cargo.py"
        cargo.write_text(
            "import json, pathlib, sys, time\n"
            f"folder = pathlib.Path({str(self.folder)!r})\n"
            "runs = folder / 'runs'\n"
            "done = len(runs.read_text().splitlines()) if runs.exists() else 0\n"
            "runs.open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
            f"times = {list(times)!r}\n"
            "if done == len(times): sys.exit(101)\n"
            "for full_id, value in (('group/own', times[done]), ('group/yardstick', 1.0)):\n"
            "    new = folder / 'target' / 'criterion' / full_id / 'new'\n"
            "    new.mkdir(parents=True, exist_ok=True)\n"
            "    (new / 'benchmark.json').write_text(json.dumps({'full_id': full_id}))\n"
            "    ends = {'lower_bound': value, 'upper_bound': value}\n"
            "    median = {'point_estimate': value, 'confidence_interval': ends}\n"
            "    (new / 'estimates.json').write_text(json.dumps({'median': median}))\n"
        )
        arguments = ["--baseline", str(self.baseline), "--cargo", f"{sys.executable} {cargo}"]
        more = settings.pop("save", "").split()
        return self.run_tool("check/bench_regression.py", *arguments, *more, CARGO_TARGET_DIR=str(self.folder / "target"))

    def runs(self) -> list[str]:
        return (self.folder / "runs").read_text().splitlines()

    def test_finds_what_has_become_slower(self) -> None:
        self.measure(2.4)
        code, said = self.judge()
        self.assertEqual(code, 1, said)
        self.assertIn("| group/own | group/yardstick | 2 | 2.4 (2.35-2.45) | 1.20 | slower |", said)
        self.assertIn("1 more than 15 % above the baseline", said)

    def test_lets_pass_what_is_within_the_bound(self) -> None:
        for own, word in ((2.0, "same"), (2.28, "same"), (1.5, "faster")):
            self.measure(own)
            code, said = self.judge()
            self.assertEqual(code, 0, said)
            self.assertIn(f"| {word} |", said)

    def test_noise_is_no_regression(self) -> None:
        self.measure(2.4, noise=0.05)
        code, said = self.judge()
        self.assertEqual(code, 0, said)
        self.assertIn("| unclear |", said)
        self.assertIn("quiet machine", said)

    def test_refuses_what_was_not_measured(self) -> None:
        self.measure(2.0, name="group/renamed")
        self.assert_refused(self.judge(), "not measured: `group/own`", "renamed")

    def test_refuses_what_is_no_baseline(self) -> None:
        for pairs in ([{"id": "a"}], [{"id": "a", "over": "b", "ratio": -1}], [{"id": 1, "over": "b", "ratio": 1}], [3]):
            self.write_baseline(pairs)
            self.assert_refused(self.judge(), str(self.baseline))
        self.baseline.unlink()
        self.assert_refused(self.judge(), "is not a valid baseline")

    def test_a_ratio_that_was_never_measured_is_no_pass(self) -> None:
        pair = {"id": "group/own", "over": "group/yardstick"}
        for unmeasured in (pair, {**pair, "ratio": None}):
            self.write_baseline([{**pair, "id": "group/other", "ratio": 1.0}, unmeasured])
            self.measure(2.0)
            for outcome in (self.judge(), self.run_with_cargo()):
                self.assert_refused(outcome, "no ratio for 1 of 2", "`group/own`", "make bench-check BENCH_CHECK=--save")
        self.assertFalse((self.folder / "runs").exists(), "it is said before anything is measured")

    def test_measures_again_what_looks_slower(self) -> None:
        code, said = self.run_with_cargo(2.6, 2.1)
        self.assertEqual(code, 0, said)
        self.assertEqual(len(self.runs()), 2)
        self.assertIn("bench --workspace --bench some -- ^(group/own|group/yardstick)$", self.runs()[0])

    def test_gives_up_after_three_runs(self) -> None:
        code, said = self.run_with_cargo(2.6, 2.5, 2.7)
        self.assertEqual(code, 1, said)
        self.assertEqual(len(self.runs()), 3)
        self.assertIn("| 2.5 (", said)

    def ratios(self) -> list:
        return [pair["ratio"] for pair in json.loads(self.baseline.read_text())["benches"]["some"]]

    def test_saves(self) -> None:
        code, said = self.run_with_cargo(3.0, save="--save")
        self.assertEqual(code, 0, said)
        pair = json.loads(self.baseline.read_text())["benches"]["some"][0]
        self.assertEqual(pair, {"id": "group/own", "over": "group/yardstick", "ratio": 3.0})

    def test_saves_what_is_missing_alone(self) -> None:
        pair = {"id": "group/own", "over": "group/yardstick", "ratio": None}
        self.write_baseline([{**pair, "id": "group/other", "ratio": 7.0}, pair])
        code, said = self.run_with_cargo(3.0, save="--save --missing")
        self.assertEqual(code, 0, said)
        self.assertEqual(self.ratios(), [7.0, 3.0])
        self.assertNotIn("group/other", self.runs()[0])

    def test_keeps_what_was_saved_before_an_end_that_came_early(self) -> None:
        pair = {"id": "group/own", "over": "group/yardstick", "ratio": None}
        # The second is measured by a yardstick of its own, in a run that does not come to an end.
        self.write_baseline([pair, {**pair, "over": "group/other"}])
        outcome = self.run_with_cargo(3.0, save="--save")
        self.assert_refused(outcome, "failed")
        self.assertEqual(len(self.runs()), 2)
        self.assertEqual(self.ratios(), [3.0, None])

    def test_refuses_what_an_earlier_run_has_left(self) -> None:
        self.measure(2.0)
        for estimates in self.folder.glob("target/criterion/**/estimates.json"):
            os.utime(estimates, (0, 0))
        outcome = self.run_tool(
            "check/bench_regression.py", "--baseline", str(self.baseline), "--cargo", "true", CARGO_TARGET_DIR=str(self.folder / "target")
        )
        self.assert_refused(outcome, "not measured: `group/own`, `group/yardstick`")

    def test_the_committed_baseline_names_each_benchmark_once(self) -> None:
        benches = bench_regression.read_baseline(bench_regression.BASELINE)["benches"]
        names = [pair["id"] for pairs in benches.values() for pair in pairs]
        self.assertEqual(len(names), len(set(names)))
        manifest = (bench_regression.BASELINE.parent / "Cargo.toml").read_text()
        for bench in benches:
            self.assertIn(f'[[bench]]\nname = "{bench}"\n', manifest)


class BenchPeers(unittest.TestCase):
    """What is made of answers; nothing is asked."""

    def answers(self, key: str, ours: list, shipped: list) -> dict:
        return {"ours": [{key: value} for value in ours], "as shipped": [{key: value} for value in shipped]}

    def test_ratios_are_of_pairs(self) -> None:
        # Of medians the ratio would be 2; of pairs it is 4, 2 and 1.
        answers = self.answers("seconds", [0.1, 0.2, 0.4], [0.4, 0.4, 0.4])
        found = bench_peers.figures(bench_peers.Row("work"), answers, {})
        self.assertEqual(found["figures"], {"ours": 200.0, "as shipped": 400.0})
        self.assertEqual(found["ratios"]["as shipped"], [1.5, 2.0, 3.0])
        self.assertEqual(bench_peers.shown_ratio(found["ratios"]["as shipped"]), "2.00 (1.50-3.00)")

    def test_answers_come_in_other_units(self) -> None:
        row = bench_peers.Row("work", "plan", "step", "us", 1e-6)
        answers = {"ours": [{"plan": 5.0}], "as shipped": [{"step": 50.0}]}
        found = bench_peers.figures(row, answers, {})
        self.assertAlmostEqual(found["figures"]["ours"], 5.0)
        self.assertAlmostEqual(found["ratios"]["as shipped"][1], 10.0)

    def test_memory_is_what_was_added_last(self) -> None:
        row = bench_peers.Row("work", "peak_kib", "peak_kib", "MiB")
        answers = self.answers("peak_kib", [2048, 3072], [4096, 5120])
        greetings = {"ours": {"resident_kib": 1024}, "as shipped": {"resident_kib": 2048}}
        found = bench_peers.figures(row, answers, greetings)
        self.assertEqual(found["figures"], {"ours": 2.0, "as shipped": 3.0})
        self.assertEqual(bench_peers.shown_ratio(found["ratios"]["as shipped"]), "1.50")
        self.assertIsNone(bench_peers.figures(row, self.answers("peak_kib", [None], [1]), greetings))

    def test_a_program_that_ends_is_named(self) -> None:
        with rounds.Program(sys.executable, "-c", "raise SystemExit(3)") as program:
            with self.assertRaisesRegex(SystemExit, "exit code 3 before a response: .* raise SystemExit"):
                program.line()

    def test_programs_take_turns(self) -> None:
        code = "import sys\nfor n, _ in enumerate(sys.stdin): print(n, flush=True)"
        with rounds.Program(sys.executable, "-c", code) as one, rounds.Program(sys.executable, "-c", code) as other:
            self.assertEqual([one.round(), other.round(), one.round()], ["0\n", "0\n", "1\n"])


class Yardsticks(ToolTest):
    def measure(self, **files: str) -> tuple[int, str]:
        """A crate of these files; `lib` is its root."""
        source = self.folder / "crates" / "one" / "src"
        source.mkdir(parents=True)
        (source.parent / "Cargo.toml").write_text('[package]\nname = "one"\n[dependencies]\n')
        for name, text in files.items():
            (source / f"{name}.rs").write_text(text)
        return self.run_tool("check/yardsticks.py", "--root", str(self.folder))

    def test_finds_a_circle_through_a_facade(self) -> None:
        outcome = self.measure(
            lib="mod a;\nmod b;\npub use a::A;\npub use b::B;\n",
            a="pub struct A {\n    pub b: crate::B,\n}\nfn f() {\n}\n",
            b="use crate::A;\npub struct B(Box<A>);\n",
        )
        self.assert_refused(outcome, "files of one import each other: a, b", "a needs b by `crate::B`", "| circles of files | 1 |")

    def test_tests_comments_and_facades_import_nothing(self) -> None:
        code, said = self.measure(
            lib="mod a;\nmod b;\npub use a::A;\npub use b::B;\n",
            a="//! `crate::B`\npub struct A;\nfn f() {\n    g(\"crate::B\");\n}\n#[cfg(test)]\nmod tests {\n    use crate::B;\n}\n",
            b="use crate::A;\n/// ```\n/// ```\npub struct B(Box<A>);\n",
        )
        self.assertEqual(code, 0, said)
        self.assertIn("| circles of files | 0 |", " ".join(said.split()))
        self.assertIn("3 / 3 / 3", said)
        self.assertIn("50 % (1 of 2)", said)

    def test_finds_a_circle_of_crates(self) -> None:
        for name, other in (("one", "two"), ("two", "one")):
            (self.folder / "crates" / name / "src").mkdir(parents=True)
            (self.folder / "crates" / name / "Cargo.toml").write_text(f"[dependencies]\n{other}.workspace = true\n")
            (self.folder / "crates" / name / "src" / "lib.rs").write_text("pub struct A;\nfn f() {}\n")
        outcome = self.run_tool("check/yardsticks.py", "--root", str(self.folder))
        self.assert_refused(outcome, "crates depend on each other: one, two")


if __name__ == "__main__":
    unittest.main()
