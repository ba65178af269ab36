#!/usr/bin/env python3
"""Records what whole pipelines of diffusers draw from given noise, for examples/src/replay.rs to compare with.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate safetensors numpy pillow
    .venv/bin/python tools/record/record_pipelines.py    # writes tests/golden/pipelines

Networks are small and random. Each folder is what `save_pretrained` writes in half precision, with an adapter for its U-Net
in `lora` and `expected.safetensors`: the `noise` to start from, for LCM also the `fresh` noise of each step, and `latent`
and `image` as they are (`plain`), with the adapter beside the weights (`apart`) and inside of them (`merged`). How they
were drawn is in its metadata.
`tools/check/parity.py` asks the same pipelines. The same versions write the same bytes, on the same kind of processor.
"""

import json
import pathlib
import shutil
import tempfile

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from record_clip import END, learn_merges, scatter, vocabulary, write_tokenizer
from record_lora import attach
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "pipelines"
PROMPTS = ["a photo of a cat", "it's a red chair, oil on canvas " * 12]
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DDIM = dict(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
GUIDANCE = {"sd": 7.5, "sdxl": 5.0, "lcm": 8.0}


class Words:
    """The vocabulary, and the two tokenizers that Stable Diffusion XL has of one: they pad with different tokens."""

    def __init__(self, folder):
        merges = learn_merges()
        self.vocab = vocabulary(merges)
        for name, pad in [("tokenizer", END), ("tokenizer_2", "!")]:
            write_tokenizer(folder / name, self.vocab, merges, pad)
        self.tokenizer, self.tokenizer_2 = (
            CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")
        )


def autoencoder(**changes):
    levels = dict(block_out_channels=(8, 12), norm_num_groups=4, layers_per_block=1, sample_size=16) | changes
    down, up = (
        (block,) * len(levels["block_out_channels"]) for block in ("DownEncoderBlock2D", "UpDecoderBlock2D")
    )
    return AutoencoderKL(in_channels=3, out_channels=3, down_block_types=down, up_block_types=up, **levels)


def text_encoder(cls, vocab, **changes):
    settings = dict(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=10, bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1,
    )
    return scatter(cls(CLIPTextConfig(**settings | changes)))


def parts(words, xl, **changes):
    torch.manual_seed(3)
    config = dict(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, attention_head_dim=(1, 2), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32 if xl else 16,
    )
    if xl:
        config |= dict(
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=6,
            projection_class_embeddings_input_dim=46,
        )
    found = dict(
        vae=scatter(autoencoder()), unet=scatter(UNet2DConditionModel(**config | changes)),
        text_encoder=text_encoder(CLIPTextModel, words.vocab), tokenizer=words.tokenizer,
    )
    if xl:
        second = text_encoder(CLIPTextModelWithProjection, words.vocab, hidden_act="gelu")
        found |= dict(text_encoder_2=second, tokenizer_2=words.tokenizer_2)
    else:
        found |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return found


def stable_diffusion(words, scheduler=None, **changes):
    return StableDiffusionPipeline(**parts(words, False, **changes), scheduler=DDIMScheduler(**DDIM | (scheduler or {})))


def stable_diffusion_xl(words, zeros):
    scheduler = DDIMScheduler(**DDIM)
    return StableDiffusionXLPipeline(**parts(words, True), scheduler=scheduler, force_zeros_for_empty_prompt=zeros)


def latent_consistency(words):
    told = parts(words, False, time_cond_proj_dim=16)
    return LatentConsistencyModelPipeline(**told, scheduler=LCMScheduler(**SCHEDULE))


def start(pipeline, sides=None):
    """Noise for two images, and the number of steps."""
    torch.manual_seed(4)
    config = pipeline.unet.config
    shape = (2, config.in_channels, *(sides or [config.sample_size] * 2))
    inputs = {"noise": torch.randn(shape)}
    if not isinstance(pipeline.scheduler, LCMScheduler):
        return inputs, 10
    # What LCMScheduler draws, step by step.
    generator = torch.Generator().manual_seed(5)
    return inputs | {"fresh": torch.stack([torch.randn(shape, generator=generator) for _ in range(4)])}, 4


@torch.no_grad()
def drawn(pipeline, noise, steps, guidance_scale):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    height, width = (side * pipeline.vae_scale_factor for side in noise.shape[2:])
    latent = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance_scale, latents=noise.clone(), generator=generator,
        height=height, width=width, output_type="latent",
    ).images
    return {"latent": latent, "image": pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample}


def record(name, pipeline, sides):
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    # Files half the size; both read them into single precision.
    pipeline.to(torch.float16).save_pretrained(folder)
    layers = {key: value.half() for key, value in attach(pipeline.unet, r=2, lora_alpha=2).items()}
    pipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers)

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    inputs, steps = start(pipeline, sides)
    how = dict(prompts=PROMPTS, steps=steps, guidance_scale=GUIDANCE[name])
    recorded = dict(inputs)
    for kind in ("plain", "apart", "merged"):
        if kind == "apart":
            pipeline.load_lora_weights(folder / "lora")
        if kind == "merged":
            pipeline.fuse_lora()
        answer = drawn(pipeline, inputs["noise"], steps, GUIDANCE[name])
        recorded |= {f"{kind}.{key}": value.contiguous() for key, value in answer.items()}
    save_file(recorded, folder / "expected.safetensors", {"how": json.dumps(how)})
    change = (recorded["apart.latent"] - recorded["plain.latent"]).abs().max() / recorded["plain.latent"].abs().max()
    print(f"{name}: {sum(file.stat().st_size for file in folder.rglob('*.*')) // 1024} KiB, the adapter changes it by {change:.2f}")


def main():
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        words = Words(pathlib.Path(folder))
        # Sides differ, so that their order in the numbers of size and crop counts.
        record("sdxl", stable_diffusion_xl(words, True), (8, 12))
        record("lcm", latent_consistency(words), (12, 8))


if __name__ == "__main__":
    main()
