#!/usr/bin/env python3
"""Runs the same inputs through diffusers, transformers and PEFT and through ddil, and compares the outputs.

    make parity                                      # installs them into the user's cache, builds, runs this
    python tools/check/parity.py --ddil PROGRAM      # with packages of your own; PROGRAM is the built example `parity`
    python tools/check/parity.py --ddil PROGRAM --sd15    # the true configuration of Stable Diffusion 1.5 too: 20 GB of memory

Networks are random, small, and made afresh; only their settings are known in advance. Errors are the greatest
difference over the greatest value. In bfloat16 both are compared with diffusers in single precision.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "record"))

from record_clip import scatter
from record_lora import attach
from record_pipelines import (
    GUIDANCE,
    PROMPTS,
    Words,
    autoencoder,
    drawn,
    latent_consistency,
    stable_diffusion,
    stable_diffusion_xl,
    start,
    text_encoder,
)
from record_unet import CONDITION_CONFIGS, condition_answer, condition_inputs

MODULE, WHOLE, HALF, GRADIENT, PIXEL = 1e-5, 1e-4, 2e-2, 1e-3, 1 / 255


class Questions:
    """The jobs for ddil, and the outputs of the others."""

    def __init__(self, folder):
        self.folder, self.jobs, self.expected = folder, [], []

    def ask(self, title, what, inputs, expected, **job):
        """`expected` maps an output's name to the tensor, the largest allowed error, and diffusers' own error, if known."""
        number = len(self.jobs)
        paths = {kind: str(self.folder / f"{number}.{kind}.safetensors") for kind in ("inputs", "outputs")}
        save_file({name: part.contiguous() for name, part in inputs.items()}, paths["inputs"])
        self.jobs.append({"what": what, **paths, **job})
        self.expected.append((title, expected))

    def answers(self, program):
        path = self.folder / "jobs.json"
        path.write_text(json.dumps(self.jobs))
        subprocess.run([program, str(path)], check=True)
        for job, (title, expected) in zip(self.jobs, self.expected):
            found = load_file(job["outputs"])
            for name, (tensor, bound, theirs) in expected.items():
                yield title, name, difference(found[name], tensor), bound, theirs


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def half(tensors):
    return {name: part.bfloat16() if part.is_floating_point() else part for name, part in tensors.items()}


def random_unet(config):
    torch.manual_seed(0)
    config = {key: value for key, value in config.items() if key not in ("size", "masked")}
    return scatter(UNet2DConditionModel(**config))


@torch.no_grad()
def ask_unets(questions):
    for name, config in CONDITION_CONFIGS.items():
        # Masks and classes are not part of the family.
        if "masked" in config or "class_embed_type" in config or "addition_embed_type_num_heads" in config:
            continue
        model = random_unet(config)
        folder = questions.folder / name
        model.save_pretrained(folder)
        inputs = condition_inputs(model.config, config["size"])
        output, _ = condition_answer(model, inputs)
        title, unet = name.removeprefix("unet_condition_"), str(folder / "")
        questions.ask(f"U-Net, {title}", "unet", inputs, {"output": (output, MODULE, None)}, folder=unet)
        theirs = difference(condition_answer(model.bfloat16(), half(inputs))[0].float(), output)
        expected = {"output": (output, HALF, theirs)}
        questions.ask(f"U-Net, {title}, bfloat16", "unet", inputs, expected, folder=unet, bfloat16=True)


def ask_gradients(questions):
    config = CONDITION_CONFIGS["unet_condition_sd15"]
    model, folder = random_unet(config), questions.folder / "unet_condition_sd15"
    inputs = condition_inputs(model.config, config["size"])
    condition_answer(model, inputs)[0].square().sum().backward()
    expected = {f"grad.{name}": (p.grad, GRADIENT, None) for name, p in model.named_parameters()}
    questions.ask("U-Net, gradients", "unet", inputs, expected, folder=str(folder), gradients=True)


@torch.no_grad()
def ask_autoencoder(questions):
    torch.manual_seed(1)
    model, folder = scatter(autoencoder(layers_per_block=1)), questions.folder / "vae"
    model.save_pretrained(folder)
    inputs = {"image": torch.rand(2, 3, 16, 24) * 2 - 1, "latent": torch.randn(2, 4, 8, 12)}

    def answer(model, inputs):
        mean = model.encode(inputs["image"]).latent_dist.mean
        return {"mean": mean.float(), "decoded": model.decode(inputs["latent"]).sample.float()}

    single = answer(model, inputs)
    theirs = answer(model.bfloat16(), half(inputs))
    questions.ask("autoencoder", "autoencoder", inputs, {n: (t, MODULE, None) for n, t in single.items()}, folder=str(folder))
    expected = {name: (tensor, HALF, difference(theirs[name], tensor)) for name, tensor in single.items()}
    questions.ask("autoencoder, bfloat16", "autoencoder", inputs, expected, folder=str(folder), bfloat16=True)


@torch.no_grad()
def ask_encoders(questions, words):
    ids = words.tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    for title, cls, act in [("", CLIPTextModel, "quick_gelu"), (" with projection", CLIPTextModelWithProjection, "gelu")]:
        torch.manual_seed(2)
        model, folder = text_encoder(cls, words.vocab, hidden_act=act), questions.folder / f"text{len(title)}"
        model.save_pretrained(folder)

        def answer(model):
            output = model(ids, output_hidden_states=True)
            last = {"text_embeds": output.text_embeds} if title else {"pooled": output.pooler_output}
            states = {"last_hidden_state": output.last_hidden_state, "last_but_one": output.hidden_states[-2]}
            return {name: tensor.float() for name, tensor in (states | last).items()}

        single, theirs = answer(model), answer(model.bfloat16())
        inputs = {"input_ids": ids}
        expected = {name: (tensor, MODULE, None) for name, tensor in single.items()}
        questions.ask(f"text encoder{title}", "text", inputs, expected, folder=str(folder))
        expected = {name: (tensor, HALF, difference(theirs[name], tensor)) for name, tensor in single.items()}
        questions.ask(f"text encoder{title}, bfloat16", "text", inputs, expected, folder=str(folder), bfloat16=True)


@torch.no_grad()
def ask_lora(questions):
    config = CONDITION_CONFIGS["unet_condition_sd15"]
    model, folder = random_unet(config), questions.folder / "unet_condition_sd15"
    inputs = condition_inputs(model.config, config["size"])
    layers = attach(model, r=2, lora_alpha=3)
    StableDiffusionLoraLoaderMixin.save_lora_weights(questions.folder / "lora", unet_lora_layers=layers)
    # As loaded: the file does not contain alpha.
    fresh = random_unet(config)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(questions.folder / "lora")
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=fresh)
    apart, _ = condition_answer(fresh, inputs)
    fresh.fuse_lora()
    merged, _ = condition_answer(fresh, inputs)
    adapter = str(questions.folder / "lora" / "pytorch_lora_weights.safetensors")
    expected = {"apart": (apart, MODULE, None), "merged": (merged, MODULE, None)}
    questions.ask("LoRA on a U-Net", "lora", inputs, expected, folder=str(folder), adapter=adapter)


def pipelines(words):
    yield "SD 1.5, DDIM", stable_diffusion(words), GUIDANCE["sd"]
    predicts_v = stable_diffusion(words, dict(prediction_type="v_prediction"), use_linear_projection=True)
    yield "SD 2.1, DDIM", predicts_v, GUIDANCE["sd"]
    for zeros in (True, False):
        title = f"SDXL, DDIM, {'zeros' if zeros else 'the empty text'} for no prompt"
        yield title, stable_diffusion_xl(words, zeros), GUIDANCE["sdxl"]
    yield "LCM", latent_consistency(words), GUIDANCE["lcm"]


def ask_model(questions, folder):
    """A text-to-image folder of the user's: a student without guidance, a teacher with."""
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    inputs, steps = start(pipeline)
    scale = 1.0 if isinstance(pipeline.scheduler, LCMScheduler) else 7.5
    expected = {name: (tensor, WHOLE, None) for name, tensor in drawn(pipeline, inputs["noise"], steps, scale).items()}
    job = dict(prompts=PROMPTS, steps=steps, guidance_scale=scale)
    questions.ask(f"{folder.name}, {steps} steps", "pipeline", inputs, expected, folder=str(folder), **job)


def ask_pipelines(questions, words):
    for number, (title, pipeline, scale) in enumerate(pipelines(words)):
        folder = questions.folder / f"pipeline{number}"
        pipeline.save_pretrained(folder)
        inputs, steps = start(pipeline)
        job = dict(prompts=PROMPTS, steps=steps, guidance_scale=scale)
        expected = drawn(pipeline, inputs["noise"], steps, scale)
        whole = {name: (tensor, WHOLE, None) for name, tensor in expected.items()}
        questions.ask(f"pipeline, {title}", "pipeline", inputs, whole, folder=str(folder), **job)
        if number == 0:
            with torch.autocast("cpu", torch.bfloat16):
                theirs = drawn(pipeline, inputs["noise"], steps, scale)
            rough = {}
            for name, tensor in expected.items():
                own = difference(theirs[name].float(), tensor)
                # Guidance multiplies what each pass is off, for diffusers too.
                rough[name] = tensor, max(HALF, 1.5 * own), own
            questions.ask(f"pipeline, {title}, bfloat16", "pipeline", inputs, rough, folder=str(folder), bfloat16=True, **job)
        yield title, folder, inputs, scale


def check_exports(questions, program, asked):
    """Folders that ddil wrote, loaded by diffusers: the same images from the same noise."""
    exports = Questions(questions.folder / "exports")
    exports.folder.mkdir()
    for title, folder, inputs, _ in asked:
        to = exports.folder / folder.name
        exports.ask(title, "copy", inputs, {}, folder=str(folder), to=str(to))
    list(exports.answers(program))
    again = Questions(questions.folder / "again")
    again.folder.mkdir()
    for title, folder, inputs, scale in asked:
        to = exports.folder / folder.name
        pipeline = DiffusionPipeline.from_pretrained(to, safety_checker=None)
        image = drawn(pipeline, inputs["noise"], 4, scale)["image"]
        # Images are in [-1, 1]: a step of 1/255 is 2/255 there.
        bound = 2 * PIXEL / image.abs().max().item()
        job = dict(prompts=PROMPTS, steps=4, guidance_scale=scale)
        again.ask(f"our export in diffusers, {title}", "pipeline", inputs, {"image": (image, bound, None)}, folder=str(to), **job)
    yield from again.answers(program)


@torch.no_grad()
def ask_sd15(questions):
    """Stable Diffusion 1.5's own settings, random weights."""
    torch.manual_seed(0)
    # diffusers' defaults are those of 1.x but for these.
    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    folder = questions.folder / "sd15"
    model.save_pretrained(folder)
    inputs = {
        "sample": torch.randn(1, 4, 64, 64), "timesteps": torch.tensor([501]),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }
    output, _ = condition_answer(model, inputs)
    parameters = sum(p.numel() for p in model.parameters())
    del model
    questions.ask(f"U-Net of SD 1.5, {parameters:,} parameters", "unet", inputs, {"output": (output, MODULE, None)}, folder=str(folder))
    vae = autoencoder(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, sample_size=512
    ).eval()
    vae.save_pretrained(questions.folder / "sd15_vae")
    inputs = {"image": torch.rand(1, 3, 256, 256) * 2 - 1, "latent": torch.randn(1, 4, 32, 32)}
    expected = {
        "mean": (vae.encode(inputs["image"]).latent_dist.mean, MODULE, None),
        "decoded": (vae.decode(inputs["latent"]).sample, MODULE, None),
    }
    questions.ask("autoencoder of SD 1.5", "autoencoder", inputs, expected, folder=str(questions.folder / "sd15_vae"))
    settings = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=49407)
    text = CLIPTextModel(CLIPTextConfig(**settings)).eval()
    text.save_pretrained(questions.folder / "sd15_text")
    inputs = {"input_ids": torch.cat([torch.randint(1, 49405, (2, 76)), torch.full((2, 1), 49407)], 1)}
    expected = {"last_hidden_state": (text(inputs["input_ids"]).last_hidden_state, MODULE, None)}
    questions.ask("text encoder of SD 1.5", "text", inputs, expected, folder=str(questions.folder / "sd15_text"))


def rows(folder, program, sd15, models):
    questions = Questions(folder)
    for model in models:
        ask_model(questions, model.resolve())
    words = Words(folder)
    ask_unets(questions)
    ask_gradients(questions)
    ask_autoencoder(questions)
    ask_encoders(questions, words)
    ask_lora(questions)
    asked = list(ask_pipelines(questions, words))
    if sd15:
        ask_sd15(questions)
    yield from questions.answers(program)
    yield from check_exports(questions, program, asked)


def grouped(rows):
    """Gradients are one row: the worst of all parameters."""
    worst = None
    for title, name, error, bound, theirs in rows:
        if not name.startswith("grad."):
            yield title, name, error, bound, theirs
        elif worst is None or error > worst[2]:
            worst = title, name, error, bound, theirs
    if worst:
        yield worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddil", required=True, metavar="PROGRAM", help="the example `parity`, built")
    parser.add_argument("--sd15", action="store_true", help="also the networks of Stable Diffusion 1.5 at their size")
    parser.add_argument("--model", nargs="*", default=[], type=pathlib.Path, help="text-to-image folders of your own too")
    arguments = parser.parse_args()
    # Both report the cut-off part of a long prompt at length, and diffusers its unknown settings.
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    failed = 0
    print("| network | output | error | bound | diffusers' own error |\n| - | - | - | - | - |")
    with tempfile.TemporaryDirectory() as folder:
        asked = rows(pathlib.Path(folder), arguments.ddil, arguments.sd15, arguments.model)
        for title, name, error, bound, theirs in grouped(asked):
            own = "" if theirs is None else f"{theirs:.1e}"
            wrong = not error <= bound
            failed += wrong
            print(f"| {title} | `{name}` | {error:.1e}{' **too much**' if wrong else ''} | {bound:.1e} | {own} |", flush=True)
    if failed:
        sys.exit(f"error: {failed} outputs differ by more than their bound")


if __name__ == "__main__":
    main()
