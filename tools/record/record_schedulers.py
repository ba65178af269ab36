#!/usr/bin/env python3
"""Records what diffusers' DDIM, LCM, Euler, DPM-Solver and UniPC schedulers compute, for tests/schedulers.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 diffusers==0.42.1 safetensors numpy mpmath
    .venv/bin/python tools/record/record_schedulers.py

Writes to tests/golden/schedulers:

ddim.safetensors    one step from a fixed input for every combination of settings, at the first, middle and last
                    timestep of the run; `kept` with the noise estimate left alone beside a clipped x0 (diffusers'
                    default), `recomputed` with use_clipped_model_output=True; `loops`, where whole runs end
lcm.safetensors     the same for LCM
solvers.safetensors whole runs of Euler, DPM-Solver++ and UniPC from a fixed state, for the settings of SOLVERS: `name/n`
                    holds timesteps, sigmas, the first state and the state after every step, as columns;
                    `settings` in its metadata lists the settings; `grids`: sums for every number of steps
tables.safetensors  alpha_cumprod: `exact` from 40 decimal digits, `diffusers` as its Float arithmetic gives them;
                    sums that tell one list of timesteps from another, for every number of steps

Axes, outermost first (DDIM):
  beta schedule  linear, scaled_linear, squaredcos_cap_v2
  zero SNR       off, on
  prediction     epsilon, sample, v_prediction
  spacing        leading (offset 1), linspace, trailing
  final alpha    one, that of timestep 0
  threshold      none, clip to 1, dynamic
  eta            0, 0.5, 1
  steps          1, 2, 4, 7, 10, 50
  which step     first, middle, last
  value          four of them
LCM has beta schedule, zero SNR, prediction, threshold, steps, which step, value.

Where a network that outputs noise stands at a timestep without signal, there is no number to record: NaN.
Everything here is deterministic; no random number is drawn.
"""

import itertools
import json
import pathlib

import diffusers
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_lcm
from mpmath import cos, mp, mpf, pi, sqrt
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "schedulers"

BETAS = {
    "linear": {"beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}
ZERO_SNR = (False, True)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
FINAL_ALPHA_ONE = (True, False)
THRESHOLDS = (
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
)
ETAS = (0.0, 0.5, 1.0)
STEPS = (1, 2, 4, 7, 10, 50)

SAMPLE = torch.tensor([1.0, -0.5, 0.25, 2.0]).view(1, 1, 2, 2)
OUTPUT = torch.tensor([0.1, 0.9, -0.3, 1.4]).view(1, 1, 2, 2)
NOISE = torch.tensor([0.3, -0.7, 1.1, -0.2]).view(1, 1, 2, 2)


def network(x, t):
    """A stand-in for a network: cheap, smooth, and different at every timestep."""
    return 0.5 * x * (1.0 + t / 1000.0)


def positions(n):
    return (0, n // 2, n - 1)


def has_number(scheduler, timestep):
    no_signal = float(scheduler.alphas_cumprod[timestep]) == 0.0
    return not (no_signal and scheduler.config.prediction_type == "epsilon")


def ddim_schedulers():
    for beta, zero, prediction, spacing, one, threshold in itertools.product(
        BETAS, ZERO_SNR, PREDICTIONS, SPACINGS, FINAL_ALPHA_ONE, THRESHOLDS
    ):
        yield DDIMScheduler(
            beta_schedule=beta,
            rescale_betas_zero_snr=zero,
            prediction_type=prediction,
            timestep_spacing=spacing,
            steps_offset=int(spacing == "leading"),
            set_alpha_to_one=one,
            **BETAS[beta],
            **threshold,
        )


def ddim_step(scheduler, eta, n, position, recompute):
    timestep = int(scheduler.timesteps[position])
    if not has_number(scheduler, timestep):
        return torch.full_like(SAMPLE, float("nan"))
    return scheduler.step(
        OUTPUT, timestep, SAMPLE, eta=eta, use_clipped_model_output=recompute, variance_noise=NOISE
    ).prev_sample


def record_ddim():
    steps = {"kept": [], "recomputed": []}
    for scheduler, eta, n in itertools.product(ddim_schedulers(), ETAS, STEPS):
        scheduler.set_timesteps(n)
        for position, (name, values) in itertools.product(positions(n), steps.items()):
            values.append(ddim_step(scheduler, eta, n, position, name == "recomputed").flatten())
    shape = (3, 2, 3, 3, 2, 3, 3, 6, 3, 4)
    tensors = {name: torch.stack(values).view(shape).numpy() for name, values in steps.items()}
    tensors["loops"] = record_loops()
    tensors |= {"sample": SAMPLE.numpy(), "output": OUTPUT.numpy(), "noise": NOISE.numpy()}
    save("ddim", tensors)


def record_loops():
    """Where runs of 4 and of 10 trailing steps end, clipped: beta schedule, prediction, steps, value."""
    ends = []
    for beta, prediction, n in itertools.product(BETAS, PREDICTIONS, (4, 10)):
        scheduler = DDIMScheduler(
            beta_schedule=beta, prediction_type=prediction, timestep_spacing="trailing", **BETAS[beta]
        )
        scheduler.set_timesteps(n)
        x = SAMPLE
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, int(t)), int(t), x, use_clipped_model_output=True).prev_sample
        ends.append(x.flatten())
    return torch.stack(ends).view(3, 3, 2, 4).numpy()


def record_lcm():
    # LCMScheduler draws its own noise; hand it ours.
    scheduling_lcm.randn_tensor = lambda *_args, **_kwargs: NOISE
    values = []
    for beta, zero, prediction, threshold, n in itertools.product(
        BETAS, ZERO_SNR, PREDICTIONS, THRESHOLDS, STEPS
    ):
        scheduler = LCMScheduler(
            beta_schedule=beta,
            rescale_betas_zero_snr=zero,
            prediction_type=prediction,
            **{"beta_start": 0.0001, "beta_end": 0.02} | BETAS[beta],
            **threshold,
        )
        for position in positions(n):
            scheduler.set_timesteps(n)
            scheduler.set_begin_index(position)
            timestep = int(scheduler.timesteps[position])
            if has_number(scheduler, timestep):
                values.append(scheduler.step(OUTPUT, timestep, SAMPLE).prev_sample.flatten())
            else:
                values.append(torch.full((4,), float("nan")))
    save("lcm", {"steps": torch.stack(values).view(3, 2, 3, 3, 6, 3, 4).numpy()})


def exact_alphas_cumprod(beta, zero_snr, total=1000):
    """The schedule's definition in 40 digits, rescaled without going back to betas."""
    mp.dps = 40

    def betas():
        if beta == "squaredcos_cap_v2":
            def signal(u):
                return cos((u + mpf("0.008")) / mpf("1.008") * pi / 2) ** 2

            for i in range(total):
                yield min(1 - signal(mpf(i + 1) / total) / signal(mpf(i) / total), mpf("0.999"))
            return
        start, end = (mpf(str(BETAS[beta][key])) for key in ("beta_start", "beta_end"))
        if beta == "scaled_linear":
            start, end = sqrt(start), sqrt(end)
        for i in range(total):
            value = start + (end - start) * i / (total - 1)
            yield value**2 if beta == "scaled_linear" else value

    table, product = [], mpf(1)
    for value in betas():
        product *= 1 - value
        table.append(product)
    if zero_snr:
        roots = [sqrt(a) for a in table]
        first, last = roots[0], roots[-1]
        table = [((root - last) * first / (first - last)) ** 2 for root in roots]
    return [float(value) for value in table]


def grid_sums(timesteps):
    """Length, sum, and sum weighted by position: equal for equal lists, and hardly for others."""
    timesteps = [int(t) for t in timesteps if t >= 0]
    return [len(timesteps), sum(timesteps), sum(i * t for i, t in enumerate(timesteps, 1))]


def record_tables():
    exact = [[exact_alphas_cumprod(beta, zero) for zero in ZERO_SNR] for beta in BETAS]
    theirs = [
        [
            DDIMScheduler(beta_schedule=beta, rescale_betas_zero_snr=zero, **BETAS[beta]).alphas_cumprod.numpy()
            for zero in ZERO_SNR
        ]
        for beta in BETAS
    ]
    ddim = []
    for spacing in SPACINGS:
        scheduler = DDIMScheduler(timestep_spacing=spacing)
        for n in range(1, 1001):
            scheduler.set_timesteps(n)
            ddim.append(grid_sums(scheduler.timesteps))
    lcm = []
    for n in range(1, 51):
        scheduler = LCMScheduler()
        scheduler.set_timesteps(n)
        lcm.append(grid_sums(scheduler.timesteps))
    save(
        "tables",
        {
            "exact": np.array(exact, dtype=np.float64),
            "diffusers": np.array(theirs, dtype=np.float32),
            "ddim_grids": np.array(ddim, dtype=np.int64).reshape(3, 1000, 3),
            "lcm_grids": np.array(lcm, dtype=np.int64),
        },
    )


def solver_settings():
    """Names and settings of the recorded runs: each setting away from the defaults, then some together."""
    stable_diffusion = {"beta_schedule": "scaled_linear", **BETAS["scaled_linear"]}
    common = {
        "default": {},
        "leading": {"timestep_spacing": "leading", "steps_offset": 1},
        "trailing": {"timestep_spacing": "trailing"},
        "karras": {"use_karras_sigmas": True},
        "karras_leading": {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1},
        "sigma_min": {"final_sigmas_type": "sigma_min"},
        "sample": {"prediction_type": "sample"},
        "v": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        "zero_snr": {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        "linear": {"beta_schedule": "linear", **BETAS["linear"]},
        "cosine_v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        "cosine_v_karras": {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
        },
    }
    dynamic = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0}
    dpm = {
        "heun": {"solver_type": "heun"},
        "order_1": {"solver_order": 1},
        "order_3": {"solver_order": 3},
        "order_3_sigma_min": {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        "no_lower_order": {"lower_order_final": False},
        "euler_at_final": {"euler_at_final": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        "heun_sigma_min": {"solver_type": "heun", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        "dynamic": dynamic,
        "clipped": {"lambda_min_clipped": -1.5},
        "clipped_leading": {"lambda_min_clipped": -1.5, "timestep_spacing": "leading"},
        "clipped_trailing": {"lambda_min_clipped": -1.5, "timestep_spacing": "trailing"},
    }
    # Of UniPC with bh1, the last step to clean data is NaN in diffusers.
    uni = {
        "bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        "order_1": {"solver_order": 1},
        "order_3": {"solver_order": 3},
        "order_3_bh1": {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        "order_3_sigma_min": {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False},
        "no_corrector": {"disable_corrector": list(range(50))},
        "late_corrector": {"disable_corrector": [0, 1]},
        "dynamic": dynamic,
    }
    for kind, own in ((EulerDiscreteScheduler, {}), (DPMSolverMultistepScheduler, dpm), (UniPCMultistepScheduler, uni)):
        for name, settings in (common | own).items():
            yield f"{kind.__name__}/{name}", kind, stable_diffusion | settings


SOLVER_STEPS = (1, 2, 3, 6, 10, 20)


def solver_run(scheduler, n):
    """Timesteps, sigmas, and the states of a run in the scale of a variance-preserving schedule."""
    scheduler.set_timesteps(n)
    # Without it, a run whose first two timesteps are equal after rounding starts at the second.
    scheduler.set_begin_index(0)
    is_euler = isinstance(scheduler, EulerDiscreteScheduler)
    x = SAMPLE * scheduler.init_noise_sigma
    scaled = []
    for i, sigma in enumerate(scheduler.sigmas):
        alpha = 1 / (1 + sigma**2) ** 0.5
        scaled.append((x * alpha if is_euler else x).flatten())
        if i == len(scheduler.timesteps):
            break
        t = scheduler.timesteps[i]
        x_t = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(x_t, float(t)), t, x).prev_sample
    return {
        "timesteps": scheduler.timesteps.numpy().astype(np.float32),
        "sigmas": scheduler.sigmas.numpy(),
        "states": torch.stack(scaled).numpy(),
    }


def record_solvers():
    tensors, settings = {}, {}
    for name, kind, arguments in solver_settings():
        scheduler = kind(**arguments)
        settings[name] = {"_class_name": kind.__name__} | arguments
        for n in SOLVER_STEPS:
            # A step between equal levels divides by zero in diffusers.
            if kind is UniPCMultistepScheduler and arguments.get("use_karras_sigmas") and n == 1:
                continue
            for key, value in solver_run(scheduler, n).items():
                tensors[f"{name}/{n}/{key}"] = value
    for kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        grids = []
        for spacing in SPACINGS:
            scheduler = kind(timestep_spacing=spacing)
            for n in range(1, 501):
                scheduler.set_timesteps(n)
                grids.append(grid_sums(scheduler.timesteps))
        tensors[f"{kind.__name__}/grids"] = np.array(grids, dtype=np.int64).reshape(3, 500, 3)
    save("solvers", tensors, {"settings": json.dumps(settings)})


def record_config_files():
    """Files as diffusers writes them, to be read and written back."""
    DDIMScheduler(beta_schedule="scaled_linear", trained_betas=None, clip_sample=False).save_pretrained(OUT / "ddim")
    LCMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).save_pretrained(OUT / "lcm")
    DPMSolverMultistepScheduler(use_karras_sigmas=True).save_pretrained(OUT / "dpm_solver")
    UniPCMultistepScheduler(solver_order=3, disable_corrector=[0]).save_pretrained(OUT / "uni_pc")
    EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1).save_pretrained(OUT / "euler")
    for name in ("ddim", "lcm", "dpm_solver", "uni_pc", "euler"):
        (OUT / name / "scheduler_config.json").rename(OUT / f"{name}_scheduler_config.json")
        (OUT / name).rmdir()


def save(name, tensors, further=None):
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    metadata = {"recorded_with": json.dumps({"diffusers": diffusers.__version__, "torch": torch.__version__.split("+")[0]})}
    path = OUT / f"{name}.safetensors"
    save_file(tensors, path, metadata=metadata | (further or {}))
    path.chmod(0o644)


if __name__ == "__main__":
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    record_tables()
    record_ddim()
    record_lcm()
    record_solvers()
    record_config_files()
