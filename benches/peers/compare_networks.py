#!/usr/bin/env python3
"""Compares this project's text-to-image U-Net with diffusers' in one run, in alternating rounds.

    python benches/peers/compare_networks.py [--threads N] [--rounds N] [--same-malloc] [--only PART]

Builds benches/network_times.rs with cargo. Needs a Python with torch and diffusers (the versions of tools/record/record_unet.py),
12 GB of memory and 4 GB of disk for the files that are loaded. A pass is of Stable Diffusion 1.5's network, batch 1 at 64x64
latents; a training step is of one of 8 million parameters, batch 8 at 32x32, with fused AdamW. Prints medians in seconds and the
median of the paired ratios, above 1 where this project is faster.
"""

import argparse
import gc
import statistics
import tempfile
import time

import rounds

FORMATS = ("", ", channels last")
CASES = (
    *(f"forward, float32{form}" for form in FORMATS),
    *(f"forward, bfloat16{form}" for form in FORMATS),
    *(f"training step, float32{form}" for form in FORMATS),
    *(f"training step, bfloat16{form}" for form in FORMATS),
    "open, 3.4 GB",
    "load, 3.4 GB",
)


def seconds(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compared(program, name, options, folder):
    from diffusers_network import case

    theirs = case(name, folder)
    with rounds.Program(program, options.threads, name, folder) as ours:
        # The first round of each is a warm-up.
        theirs(), ours.round()
        pairs = [(seconds(theirs), float(ours.round())) for _ in range(options.rounds)]
    peer, own = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    print(f"| {name} | {peer:.3f} | {own:.3f} | {ratio:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rounds.add_options(parser, 9)
    parser.add_argument("--only", default="", help="cases with this in their names")
    options = parser.parse_args()
    if options.same_malloc:
        rounds.same_malloc()
    program = rounds.built("network_times")
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(options.threads)
    print(f"{options.threads} thread(s), {options.rounds} rounds\n\n| case | diffusers, s | ddil, s | ratio |\n| - | - | - | - |")
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in CASES if options.only in name):
            if name.endswith("GB"):
                UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_pretrained(folder, max_shard_size="9GB")
            compared(program, name, options, folder)
            gc.collect()


if __name__ == "__main__":
    main()
