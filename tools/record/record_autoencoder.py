#!/usr/bin/env python3
"""Records outputs of diffusers' AutoencoderKL for tests/models/autoencoder.rs.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers safetensors numpy
    .venv/bin/python tools/record/record_autoencoder.py            # writes tests/golden/models
    .venv/bin/python tools/record/record_autoencoder.py --check DIR [--variant fp16]  # loads a folder that ddil wrote

Each folder holds what `save_pretrained` writes, and `expected.safetensors`: `images`, `mean` and `logvar` of their
latents, `sample`, a draw with a generator seeded with 7, `scaled`, the mean as a diffusion model sees it, `decoded`, the
images of the mean, `bfloat16.NAME`, three of these from the network in that kind, and for every parameter `grad.NAME`: norm of the gradient of the sum of squares of `decoded`, and its
product with cos(0), cos(1), cos(2), ..
The same versions write the same bytes.
"""

import pathlib

import checked
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "models"

# Between them they use every setting that changes a number.
CONFIGS = {
    "autoencoder_sd": dict(
        in_channels=3, out_channels=3, block_out_channels=(8, 8, 12), layers_per_block=1, norm_num_groups=4,
        latent_channels=4, sample_size=16,
    ),
    "autoencoder_shift": dict(
        in_channels=1, out_channels=2, block_out_channels=(8, 8), layers_per_block=2, norm_num_groups=4,
        latent_channels=5, sample_size=(16, 8), use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.3611, shift_factor=0.1159, force_upcast=False, act_fn="mish",
    ),
    "autoencoder_statistics": dict(
        in_channels=2, out_channels=2, block_out_channels=(6, 12), layers_per_block=1, norm_num_groups=3,
        latent_channels=3, sample_size=16, use_post_quant_conv=False, mid_block_add_attention=False,
        scaling_factor=0.5, latents_mean=(-1.6, 0.25, 0.5), latents_std=(8.5, 0.5, 2.0),
    ),
}


def per_channel(values):
    return torch.tensor(values).view(1, -1, 1, 1)


def scale(config, latents):
    """As the pipelines of diffusers do it, each for its kind of autoencoder."""
    if config.latents_mean is not None:
        mean, std = per_channel(config.latents_mean), per_channel(config.latents_std)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def answer(model, images, latents=None):
    distribution = model.encode(images).latent_dist
    return {
        "mean": distribution.mean,
        "logvar": distribution.logvar,
        "sample": distribution.sample(torch.Generator().manual_seed(7)),
        "kl": distribution.kl(),
        "scaled": scale(model.config, distribution.mean),
        "decoded": model.decode(distribution.mean if latents is None else latents).sample,
    }


def summary(gradient):
    flat = gradient.double().flatten()
    return torch.stack([flat.norm(), flat @ torch.arange(len(flat), dtype=torch.double).cos()])


def record(name, config):
    torch.manual_seed(0)
    levels = len(config["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    model = AutoencoderKL(**config, **blocks).eval()
    with torch.no_grad():
        # Fresh norms are all ones and zeros, which would hide a norm that is left out.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(2, config["in_channels"], 16, 8) * 2 - 1
    recorded = {"images": images} | answer(model, images)
    recorded["decoded"].square().sum().backward()
    for key, parameter in model.named_parameters():
        recorded[f"grad.{key}"] = summary(parameter.grad)
    folder = GOLDEN / name
    model.save_pretrained(folder)
    with torch.no_grad():
        halved = answer(model.bfloat16(), images.bfloat16(), recorded["mean"].bfloat16())
    recorded |= {f"bfloat16.{key}": halved[key] for key in ["mean", "logvar", "decoded"]}
    recorded = {key: value.detach().contiguous() for key, value in recorded.items()}
    save_file(recorded, folder / "expected.safetensors")
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, std {recorded['decoded'].std():.3f}")


def check(folder, variant):
    """Loads a folder that ddil wrote and compares its output with the recorded one."""
    model, recorded = checked.load(AutoencoderKL, folder, variant=variant)
    with torch.no_grad():
        answers = answer(model, recorded["images"])
    for key in ["mean", "logvar", "scaled", "decoded"]:
        checked.compare(f"{folder.name} {key}", answers[key], recorded[key])


def record_all():
    for name, config in CONFIGS.items():
        record(name, config)


def main():
    arguments = checked.arguments(__doc__, "--variant")
    checked.run(arguments, lambda folder: check(folder, arguments.variant), record_all)


if __name__ == "__main__":
    main()
