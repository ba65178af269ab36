#!/usr/bin/env python3
"""Tests of the fetching tools: what they refuse, and that refusing leaves everything as it was. No network is used."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import check_licences
import ddil_cache
import get_fashion_mnist

TOOLS = pathlib.Path(__file__).resolve().parent
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
        code, said = self.run_tool("get_libtorch.py", LIBTORCH=own, DDIL_CUDA="1")
        self.assertEqual(code, 0, said)
        self.assertIn("2.13.0+cu130 (with CUDA)", said)
        self.assertFalse((self.folder / "cache").exists())

    def test_reads_the_version_of_an_installed_torch(self) -> None:
        own = self.make_libtorch("", "libtorch_cpu.so")
        os.remove(os.path.join(own, "build-version"))
        pathlib.Path(own, "version.py").write_text("from typing import Optional\n__version__ = '2.14.1+cpu'\n")
        self.assert_refused(self.run_tool("get_libtorch.py", LIBTORCH=own), "2.14.1+cpu")

    def test_refuses_another_version(self) -> None:
        own = self.make_libtorch("2.12.0+cpu", "libtorch_cpu.so")
        self.assert_refused(self.run_tool("get_libtorch.py", LIBTORCH=own), "2.12.0+cpu", "2.13.0", "pip install")

    def test_refuses_a_folder_without_the_library(self) -> None:
        own = self.make_libtorch("2.13.0+cpu")
        self.assert_refused(self.run_tool("get_libtorch.py", LIBTORCH=own), "no libtorch_cpu.so")

    def test_refuses_what_is_no_libtorch(self) -> None:
        self.assert_refused(self.run_tool("get_libtorch.py", LIBTORCH=str(self.folder)), "does not look like a libtorch")

    def test_refuses_a_path_that_torch_sys_would_misread(self) -> None:
        for value in ("", "relative/torch", str(self.folder / "absent")):
            self.assert_refused(self.run_tool("get_libtorch.py", LIBTORCH=value), "absolute path", repr(value))

    def test_refuses_cpu_only_where_cuda_was_asked_for(self) -> None:
        own = self.make_libtorch("2.13.0+cpu", "libtorch_cpu.so")
        self.assert_refused(self.run_tool("get_libtorch.py", LIBTORCH=own, DDIL_CUDA="1"), "CPU-only", "pip install")

    def test_refuses_a_python_without_torch(self) -> None:
        empty = {"LIBTORCH_USE_PYTORCH": "1", "PATH": str(self.folder)}
        self.assert_refused(self.run_tool("get_libtorch.py", **empty), "no such program")


class GetFashionMnist(ToolTest):
    def test_check_downloads_nothing(self) -> None:
        self.assert_refused(self.run_tool("get_fashion_mnist.py", "--check"), "is missing", "make setup")
        self.assertFalse((self.folder / "cache").exists())

    def test_a_folder_of_the_users_own_is_never_filled(self) -> None:
        outcome = self.run_tool("get_fashion_mnist.py", DDIL_DATA=str(self.folder))
        self.assert_refused(outcome, "DDIL_DATA", "train-images-idx3-ubyte is missing")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_names_a_damaged_file(self) -> None:
        (self.folder / LABELS).write_bytes(b"\0\0\x08\x01")
        outcome = self.run_tool("get_fashion_mnist.py", DDIL_DATA=str(self.folder))
        self.assert_refused(outcome, f"{LABELS} has the wrong checksum")


class CheckLicences(ToolTest):
    def check(self, **package: object) -> tuple[int, str]:
        metadata = self.folder / "metadata.json"
        whole = {"name": "a", "version": "1.0.0", "license": "MIT", "source": None, **package}
        metadata.write_text(json.dumps({"packages": [whole]}))
        return self.run_tool("check_licences.py", "--metadata", str(metadata))

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
        self.assert_refused(self.check(license=None), "a 1.0.0: says no licence")
        self.assert_refused(self.check(source="git+https://example.org/a"), "comes from git+https://example.org/a")


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


if __name__ == "__main__":
    unittest.main()
