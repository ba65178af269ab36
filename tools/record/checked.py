"""What the recorders of models share: `--check DIR..` loads folders that ddil wrote and compares with the recorded outputs."""

import argparse
import pathlib

import torch
from safetensors.torch import load_file

# The largest difference, in units of the largest recorded value.
TOLERANCE = 1e-5


def arguments(description, *options):
    """The arguments of a recorder: `--check`, and further options with one value each."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--check", nargs="+", type=pathlib.Path, metavar="DIR", default=[])
    for option in options:
        parser.add_argument(option)
    return parser.parse_args()


def run(given, check, record):
    """Checks the folders of `--check`, or records if there are none. Results must not depend on the number of threads."""
    torch.set_num_threads(1)
    for folder in given.check:
        check(folder)
    if not given.check:
        record()


def load(cls, folder, **options):
    """The model of a folder, which must have all of its weights and no others, and the recorded tensors."""
    model, loading = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(loading.values()), loading
    return model.eval(), load_file(folder / "expected.safetensors")


def difference(found, expected):
    """The largest difference, in units of the largest expected value."""
    return (found - expected).abs().max() / expected.abs().max()


def compare(name, found, expected, note=""):
    error = difference(found, expected)
    print(f"{name}: max relative error {error:.2e}{note}")
    assert error <= TOLERANCE, f"{name}: {error} is more than {TOLERANCE}"
