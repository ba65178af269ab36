#!/usr/bin/env python3
"""Times diffusers' schedulers for a sample of four steps on the CPU, with a network that costs nothing.

    python benches/peers/diffusers_sampling.py [THREADS]

Prints the median of 25 rounds, in microseconds, by case and shape. `compare_sampling.py` alternates the same rounds with
this project's.
"""

import statistics
import sys
import time

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

SHAPES = ((4, 4, 64, 64), (16, 4, 128, 128))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4


def samplers():
    """Each case as a function of noise and of the network's output, the loop of a pipeline."""
    ddim = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **BETAS)
    clamped = DDIMScheduler(clip_sample=True, timestep_spacing="trailing", **BETAS)
    lcm = LCMScheduler(**BETAS)
    euler = EulerDiscreteScheduler(**BETAS)
    dpm_solver = DPMSolverMultistepScheduler(**BETAS)
    uni_pc = UniPCMultistepScheduler(**BETAS)

    def loop(scheduler, x, output, **options):
        # Timesteps are set once per sample, as a pipeline does.
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            x = scheduler.step(output, t, x, return_dict=False, **options)[0]
        return x

    def scaled_loop(scheduler, x, output):
        scheduler.set_timesteps(STEPS)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    return {
        "DDIM": lambda x, output: loop(ddim, x, output),
        "DDIM, clamped": lambda x, output: loop(clamped, x, output, use_clipped_model_output=True),
        "LCM": lambda x, output: loop(lcm, x, output),
        "Euler": lambda x, output: scaled_loop(euler, x, output),
        "DPM-Solver++ 2M": lambda x, output: loop(dpm_solver, x, output),
        "UniPC": lambda x, output: loop(uni_pc, x, output),
    }


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Rounds:
    def __init__(self, threads):
        torch.set_num_threads(threads)
        # As in a pipeline: tables on the host, samples on the device.
        with torch.device("cpu"):
            self.samplers = samplers()
        self.batches = {shape: (torch.randn(shape), torch.randn(shape)) for shape in SHAPES}

    @torch.no_grad()
    def run(self):
        """Times every case once: microseconds per sample, by case and shape."""
        times = {}
        for shape, (noise, output) in self.batches.items():
            for case, sample in self.samplers.items():
                samples = 8 if shape[0] > 8 else 80
                sample(noise, output)
                wait(noise.device)
                started = time.perf_counter()
                for _ in range(samples):
                    sample(noise, output)
                wait(noise.device)
                elapsed = time.perf_counter() - started
                times[f"{case} {'x'.join(map(str, shape))}"] = elapsed * 1e6 / samples
        return times


if __name__ == "__main__":
    rounds = Rounds(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    recorded = [rounds.run() for _ in range(25)]
    for case in recorded[0]:
        print(f"{case:32} {statistics.median(times[case] for times in recorded):10.1f} us")
