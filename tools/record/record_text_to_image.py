#!/usr/bin/env python3
"""Records what diffusers draws with the text-to-image model of the examples, for examples/src/text_to_image to compare with.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 safetensors numpy
    cargo run --release --example text_to_image -- --steps 4 --record runs/drawn.safetensors
    .venv/bin/python tools/record/record_text_to_image.py runs/drawn.safetensors          # writes tests/golden/text_to_image
    .venv/bin/python tools/record/record_text_to_image.py --check runs/drawn.safetensors  # compares alone; any file of the example

A file of the example has noise, pictures and how they were drawn; diffusers' StableDiffusionPipeline draws from the same
noise here. `drawn.safetensors` gets its pictures, `tokens.json` what its tokenizer makes of some prompts. The same versions
write the same bytes, on the same kind of processor.
"""

import argparse
import json
import pathlib

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets" / "fashion-mnist-text-to-image"
GOLDEN = ROOT / "tests" / "golden" / "text_to_image"

PROMPTS = [
    "", "a small grey picture of an ankle boot", "T-Shirt", "this is a photo of trousers on black", "a trainer, grey on black",
    "handbag from a shop, black background", "here is a product picture: an open shoe", "a purple elephant!? 1999",
    "it's na\u00efve \u732b", "a dress " * 20,
]


def read(path):
    with safe_open(path, "pt") as file:
        how = file.metadata()
        return {key: file.get_tensor(key) for key in file.keys()}, how


def draw(model, noise, how):
    """Diffusers' samples from that noise, in [-1, 1] as in ddil; not clamped."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        json.loads(how["prompts"]), latents=noise, num_inference_steps=int(how["steps"]),
        guidance_scale=float(how["guidance_scale"]), output_type="latent",
    ).images
    with torch.no_grad():
        return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample


def compare(found, expected):
    """The largest difference of two images, in floating point and in the steps of a PNG file."""
    def pixels(images):
        return ((images + 1) * 127.5).clamp(0, 255).round()

    error = (found - expected).abs().max().item()
    steps = (pixels(found) - pixels(expected)).abs()
    print(f"largest difference {error:.2e} of [-1, 1]; {int(steps.max())} of 255 in a pixel, in {int((steps > 0).sum())} of {steps.numel()}")
    return int(steps.max())


def record_tokens(model):
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    rows = [{"prompt": prompt, "input_ids": row} for prompt, row in zip(PROMPTS, ids)]
    text = ",\n".join(json.dumps(row) for row in rows)
    (GOLDEN / "tokens.json").write_text(f"[\n{text}\n]\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drawn", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, default=MODEL)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ours, how = read(arguments.drawn)
    images = draw(arguments.model, ours["noise"], how)
    assert compare(ours["images"], images) <= 1
    if not arguments.check:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        save_file({"noise": ours["noise"], "images": images.contiguous()}, GOLDEN / "drawn.safetensors", how)
        record_tokens(arguments.model)


if __name__ == "__main__":
    main()
