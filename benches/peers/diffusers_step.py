#!/usr/bin/env python3
"""How long diffusers' DDIM and LCM schedulers take for one step on the CPU.

    python benches/peers/diffusers_step.py [THREADS]

Prints the median of 25 rounds, in microseconds, by case and shape. `compare_steps.py` alternates the same rounds with
this project's.
"""

import statistics
import sys
import time

import torch
from diffusers import DDIMScheduler, LCMScheduler

SHAPES = ((4, 4, 64, 64), (16, 4, 128, 128))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def steps():
    """Each case as a function of a batch and of what the network said of it."""
    ddim = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **BETAS)
    clipped = DDIMScheduler(clip_sample=True, timestep_spacing="trailing", **BETAS)
    lcm = LCMScheduler(**BETAS)
    for scheduler in (ddim, clipped, lcm):
        scheduler.set_timesteps(4)
    lcm_timestep = int(lcm.timesteps[1])

    def lcm_step(x_t, output):
        # Where a run would have brought it, without walking there.
        lcm._step_index = 1
        return lcm.step(output, lcm_timestep, x_t, return_dict=False)

    # Timesteps as plain numbers: a pipeline hands over tensors, which is slower.
    return {
        "ddim": lambda x_t, output: ddim.step(output, 749, x_t, return_dict=False),
        "ddim clipped": lambda x_t, output: clipped.step(
            output, 749, x_t, use_clipped_model_output=True, return_dict=False
        ),
        "lcm": lcm_step,
    }


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Rounds:
    def __init__(self, threads):
        torch.set_num_threads(threads)
        # As a pipeline has them: tables on the host, samples on the device.
        with torch.device("cpu"):
            self.steps = steps()
        self.batches = {shape: (torch.randn(shape), torch.randn(shape)) for shape in SHAPES}

    @torch.no_grad()
    def run(self):
        """Times every case once: microseconds a step, by case and shape."""
        times = {}
        for shape, (x_t, output) in self.batches.items():
            for case, step in self.steps.items():
                calls = 20 if shape[0] > 8 else 200
                step(x_t, output)
                wait(x_t.device)
                started = time.perf_counter()
                for _ in range(calls):
                    step(x_t, output)
                wait(x_t.device)
                elapsed = time.perf_counter() - started
                times[f"{case} {'x'.join(map(str, shape))}"] = elapsed * 1e6 / calls
        return times


if __name__ == "__main__":
    rounds = Rounds(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    recorded = [rounds.run() for _ in range(25)]
    for case in recorded[0]:
        print(f"{case:32} {statistics.median(times[case] for times in recorded):10.1f} us")
