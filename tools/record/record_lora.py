#!/usr/bin/env python3
"""Records what diffusers and PEFT make of adapters of low rank, for tests/models/lora.rs to compare with.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 diffusers==0.42.1 peft==0.21.2 transformers safetensors numpy
    .venv/bin/python tools/record/record_lora.py            # writes tests/golden/models
    .venv/bin/python tools/record/record_lora.py --check DIR...  # loads adapters that ddil wrote
    .venv/bin/python tools/record/record_lora.py --check-pipeline DIR  # loads what a run exports into a pipeline

Each folder is for the network and the inputs of `unet_condition_NAME` beside it. It holds the adapters as
`save_lora_weights` writes them and with kohya's names, and `expected.safetensors`: the `output` with the adapters, the
output `fused` with them in the base weights, and `gradients` of the sum of squared outputs: row i for parameter i in the
order of their names, as record_unet.py has them, in double precision. `lora_names.json` has the layers of Stable Diffusion
1.5 and XL by their names in the original code, as diffusers reads these.
The same versions write the same bytes.
"""

import json
import pathlib

import checked
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict
from record_unet import condition_answer
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "models"

# Those of diffusers' script that trains an LCM-LoRA.
TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]
LORAS = {
    # Rank and alpha differ, also between layers.
    "sd15": dict(r=2, lora_alpha=3, rank_pattern={"mid_block.resnets.0.conv1": 5}, alpha_pattern={"attn2.to_v": 7}),
    # Without alpha.
    "sdxl": dict(r=2, lora_alpha=2),
}
WEIGHTS = "pytorch_lora_weights.safetensors"


def base(name):
    folder = GOLDEN / f"unet_condition_{name}"
    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    return model, load_file(folder / "expected.safetensors")


def kohya(model, state):
    """As the script that trains an LCM-LoRA names it."""
    renamed = {}
    for key, tensor in state.items():
        key = f"lora_unet.{key}".replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        key = key.replace(".", "_", key.count(".") - 2)
        renamed[key] = tensor
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            renamed[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(float(module.lora_alpha["default"]))
    return renamed


def plain(name):
    return name.replace(".default.", ".")


def gradients(model, inputs):
    model = model.double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    condition_answer(model, inputs)[0].square().sum().backward()
    named = sorted((plain(name), p.grad) for name, p in model.named_parameters() if "lora_" in name)
    rows = []
    for _, gradient in named:
        flat = gradient.flatten()
        rows.append(torch.stack([flat.norm(), flat @ torch.arange(1, len(flat) + 1, dtype=flat.dtype).cos()]))
    model.float()
    return torch.stack(rows)


@torch.no_grad()
def attach(model, **config):
    """Adapters that do something, and these as PEFT keeps them."""
    model.add_adapter(LoraConfig(target_modules=TARGETS, **config))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return get_peft_model_state_dict(model)


def record(name, config):
    torch.manual_seed(0)
    model, inputs = base(name)
    state = attach(model, **config)
    with torch.no_grad():
        output, _ = condition_answer(model, inputs)
    folder = GOLDEN / f"lora_{name}"
    # Left out once, as older files have it.
    metadata = _collate_lora_metadata({"unet": model}) if name == "sd15" else {}
    for settings in metadata.values():
        # A set otherwise, whose order changes from run to run.
        settings["target_modules"] = sorted(settings["target_modules"])
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=state, **metadata)
    save_file(kohya(model, state), folder / "kohya.safetensors", metadata={"format": "pt"})
    recorded = {"output": output, "gradients": gradients(model, inputs)}
    model.fuse_lora()
    with torch.no_grad():
        recorded["fused"], _ = condition_answer(model, inputs)
    save_file({key: value.detach().contiguous() for key, value in recorded.items()}, folder / "expected.safetensors")
    change = (output - inputs["output"]).abs().max() / inputs["output"].abs().max()
    print(f"lora_{name}: {sum(p.numel() for p in state.values())} values, the output changes by {change:.2f}")


def check(folder):
    """Loads every file of adapters in a folder as `load_lora_weights` does, and compares with the recorded output."""
    name = folder.name.removeprefix("lora_")
    expected = load_file(folder / "expected.safetensors")["output"]
    for file in filter(lambda file: (folder / file).exists(), [WEIGHTS, "kohya.safetensors"]):
        model, inputs = base(name)
        mixin = StableDiffusionLoraLoaderMixin
        state, alphas, metadata = mixin.lora_state_dict(folder, weight_name=file, return_lora_metadata=True)
        mixin.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
        with torch.no_grad():
            output, _ = condition_answer(model, inputs)
        change = checked.difference(output, inputs["output"])
        checked.compare(f"{folder.name}/{file}", output, expected, f", of an output that changes by {change:.2f}")
        assert change > 0.01


def check_pipeline(root):
    """Loads the adapter of tests/models/adapted.rs with `load_lora_weights`, and compares."""
    expected = load_file(root / "expected.safetensors")
    unet = UNet2DConditionModel.from_pretrained(root / "base", subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(root / "base", subfolder="scheduler")
    parts = dict(vae=None, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None)
    pipe = StableDiffusionPipeline(unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    inputs = [expected[name] for name in ("x_t", "timesteps", "encoder_hidden_states")]

    def error(name):
        with torch.no_grad():
            output = pipe.unet(*inputs).sample
        return float(checked.difference(output, expected[name]))

    print(f"base: max relative error {error('of_teacher'):.2e}")
    pipe.load_lora_weights(root / "adapter")
    pipe.scheduler = LCMScheduler.from_pretrained(root / "adapter", subfolder="scheduler")
    apart, change = error("output"), error("of_teacher")
    pipe.fuse_lora()
    print(f"adapter: {apart:.2e}, fused {error('output'):.2e}, of an output that changes by {change:.2f}")
    print(f"adapters {pipe.get_active_adapters()}, {type(pipe.scheduler).__name__}")
    assert max(apart, error("output")) <= checked.TOLERANCE and change > 0.01


def original_names(config):
    """What diffusers makes of the names of the original code in kohya's files, for the layers of one network."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    layers = {name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    inner = ["in_layers_2", "out_layers_3", "emb_layers_1", "skip_connection", "proj_in", "proj_out"]
    inner += [f"transformer_blocks_0_{end}" for end in ("attn1_to_q", "attn2_to_out_0", "ff_net_0_proj", "ff_net_2")]
    count = (model.config.layers_per_block + 1) * len(model.config.block_out_channels)
    blocks = [f"{path}_{i}" for path in ("input_blocks", "output_blocks") for i in range(count)]
    blocks += [f"middle_block_{i}" for i in range(3)]
    names = [f"{block}_{end}" if "middle" in block else f"{block}_{j}_{end}"
             for block in blocks for j in range(3) for end in [*inner, "op", "conv"]]
    names += ["input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"]
    found = {}
    for name in names:
        state = {f"lora_unet_{name}.lora_{part}.weight": torch.zeros(1) for part in ("down", "up")}
        try:
            state = _maybe_map_sgm_blocks_to_diffusers(state, model.config)
            state, _ = _convert_non_diffusers_lora_to_diffusers(state)
        except (ValueError, IndexError, KeyError):
            continue
        state = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in state.items()})
        layer = next(key for key in state if "lora_A" in key).split(".lora_A")[0]
        # diffusers reads several names as the layer between two levels; the original one is the last.
        if layer in layers and ("_op" not in name or name.endswith("_0_op")) and ("output" not in name or "_op" not in name):
            found[layer] = name
    return {name: layer for layer, name in sorted(found.items())}


def record_names():
    xl = dict(
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    names = {"sd15": original_names(dict(cross_attention_dim=768)), "sdxl": original_names(xl)}
    (GOLDEN / "lora_names.json").write_text(json.dumps(names, indent=1) + "\n")
    print({name: len(layers) for name, layers in names.items()})


def record_all():
    for name, config in LORAS.items():
        record(name, config)
    record_names()


def main():
    arguments = checked.arguments(__doc__, "--check-pipeline")
    if arguments.check_pipeline:
        torch.set_num_threads(1)
        return check_pipeline(pathlib.Path(arguments.check_pipeline))
    checked.run(arguments, check, record_all)


if __name__ == "__main__":
    main()
