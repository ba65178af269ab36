#!/usr/bin/env python3
"""Records what diffusers' UNet2DModel answers, for tests/models/unet.rs to compare with.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers safetensors numpy
    .venv/bin/python tools/record_unet.py            # writes tests/golden/models
    .venv/bin/python tools/record_unet.py --check DIR...  # loads folders that ddil wrote

Each folder holds what `save_pretrained` writes, and `expected.safetensors`: `sample`, `timesteps`,
`class_labels` and `guidance_weight` where the network is told them, the `output`, the `features` that leave the bottom level, and
`grad.NAME`, the gradient of the sum of squared outputs with respect to a few parameters.
The same versions write the same bytes.
"""

import argparse
import json
import pathlib

import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from safetensors.torch import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "models"

DOWN, ATTN_DOWN = "DownBlock2D", "AttnDownBlock2D"
UP, ATTN_UP = "UpBlock2D", "AttnUpBlock2D"

# Between them they use every setting that changes a forward pass.
CONFIGS = {
    "unet_unconditional": dict(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8, 16), layers_per_block=2,
        down_block_types=(DOWN, ATTN_DOWN, DOWN), up_block_types=(UP, ATTN_UP, UP), attention_head_dim=4,
        norm_num_groups=4, freq_shift=1, flip_sin_to_cos=False, downsample_padding=0, norm_eps=1e-6,
    ),
    "unet_class_labels": dict(
        sample_size=(8, 4), in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP), attention_head_dim=8,
        norm_num_groups=8, attn_norm_num_groups=4, num_class_embeds=11, mid_block_scale_factor=1.4142,
        dropout=0.1, num_train_timesteps=1000,
    ),
    "unet_fourier_scale_shift": dict(
        sample_size=8, in_channels=2, out_channels=4, block_out_channels=(8, 16), layers_per_block=2,
        down_block_types=(ATTN_DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, ATTN_UP), attention_head_dim=8,
        norm_num_groups=2, time_embedding_type="fourier", resnet_time_scale_shift="scale_shift",
        center_input_sample=True,
    ),
    "unet_timestep_classes": dict(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(9, 18), layers_per_block=1,
        down_block_types=(DOWN, DOWN), up_block_types=(UP, UP), attention_head_dim=None, norm_num_groups=3,
        add_attention=False, class_embed_type="timestep", time_embedding_dim=20, act_fn="mish",
    ),
    "unet_identity_classes": dict(
        sample_size=None, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP), attention_head_dim=None,
        norm_num_groups=4, mid_block_type=None, class_embed_type="identity", act_fn="gelu",
    ),
    # Not a setting of diffusers' UNet2DModel: its parts are put together here.
    "unet_guidance": dict(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=(DOWN, DOWN), up_block_types=(UP, UP), norm_num_groups=4, num_class_embeds=3,
        add_attention=False, time_cond_proj_dim=33,
    ),
}

GRADIENTS = [
    "conv_in.weight",
    "time_embedding.linear_1.weight",
    "time_embedding.cond_proj.weight",
    "class_embedding.weight",
    "class_embedding.linear_2.bias",
    "down_blocks.1.attentions.0.to_q.weight",
    "mid_block.resnets.1.time_emb_proj.weight",
    "up_blocks.0.upsamplers.0.conv.bias",
]


class GuidedEmbedding(TimestepEmbedding):
    """diffusers' embedding of a timestep, with the condition that UNet2DModel would not hand on."""

    condition = None

    def forward(self, sample, condition=None):
        return super().forward(sample, self.condition)


def build(config):
    config = dict(config)
    width = config.pop("time_cond_proj_dim", None)
    model = UNet2DModel(**config)
    if width is not None:
        first = config["block_out_channels"][0]
        model.time_embedding = GuidedEmbedding(first, 4 * first, cond_proj_dim=width)
    return model.eval()


def embed_guidance(weight, width):
    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, weight, width)


def inputs(config):
    batch, height, width = 3, 8, 4 if config["sample_size"] == (8, 4) else 8
    recorded = {"sample": torch.randn(batch, config["in_channels"], height, width)}
    if config.get("time_embedding_type") == "fourier":
        recorded["timesteps"] = torch.tensor([0.02, 1.5, 60.0])
    else:
        recorded["timesteps"] = torch.tensor([999, 500, 0])
    if config.get("class_embed_type") == "timestep":
        recorded["class_labels"] = torch.tensor([0.5, 3.0, 7.0])
    elif config.get("class_embed_type") == "identity":
        recorded["class_labels"] = torch.randn(batch, 4 * config["block_out_channels"][0])
    elif "num_class_embeds" in config:
        classes = config["num_class_embeds"]
        recorded["class_labels"] = torch.tensor([0, classes - 1, (classes - 2) // 2])
    if "time_cond_proj_dim" in config:
        recorded["guidance_weight"] = torch.tensor([7.5, 0.0, 2.25])
    return recorded


def answer(model, recorded):
    """The output and the features of the bottom level."""
    features = []
    bottom = model.mid_block if model.mid_block is not None else model.down_blocks[-1]

    def keep(_module, _args, output):
        features.append(output[0] if isinstance(output, tuple) else output)

    handle = bottom.register_forward_hook(keep)
    output = model(recorded["sample"], recorded["timesteps"], recorded.get("class_labels")).sample
    handle.remove()
    return output, features[0]


def record(name, config):
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        # Fresh norms are all ones and zeros, which would hide a norm that is left out.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    recorded = inputs(config)
    if "guidance_weight" in recorded:
        width = config["time_cond_proj_dim"]
        model.time_embedding.condition = embed_guidance(recorded["guidance_weight"], width)
    output, features = answer(model, recorded)
    output.square().sum().backward()
    recorded |= {"output": output, "features": features}
    parameters = dict(model.named_parameters())
    recorded |= {f"grad.{key}": parameters[key].grad for key in GRADIENTS if key in parameters}
    folder = GOLDEN / name
    model.save_pretrained(folder)
    if "time_cond_proj_dim" in config:
        path = folder / "config.json"
        settings = json.loads(path.read_text()) | {"time_cond_proj_dim": config["time_cond_proj_dim"]}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    recorded = {key: value.detach().contiguous() for key, value in recorded.items()}
    save_file(recorded, folder / "expected.safetensors")
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, output std {output.std():.3f}")


def check(folder):
    """Loads a folder that ddil wrote and compares with the answer it wrote beside it."""
    model, loading = UNet2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    recorded = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        output, _ = answer(model.eval(), recorded)
    error = (output - recorded["output"]).abs().max() / recorded["output"].abs().max()
    print(f"{folder.name}: max relative error {error:.2e}")
    assert error <= 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="+", type=pathlib.Path, metavar="DIR")
    folders = parser.parse_args().check
    torch.set_num_threads(1)
    if folders:
        for folder in folders:
            check(folder)
    else:
        for name, config in CONFIGS.items():
            record(name, config)


if __name__ == "__main__":
    main()
