#!/usr/bin/env python3
"""Records outputs of diffusers' U-Nets for tests/models/unet.rs and unet_condition.rs.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers safetensors numpy
    .venv/bin/python tools/record/record_unet.py            # writes tests/golden/models
    .venv/bin/python tools/record/record_unet.py --check DIR...  # loads folders that ddil wrote

Each folder holds what `save_pretrained` writes, and `expected.safetensors`: `sample`, `timesteps`,
`class_labels` and `guidance_weight` where the network is told them, the `output`, the `features` that leave the bottom level, and
`grad.NAME`, the gradient of the sum of squared outputs with respect to a few parameters.

Folders of UNet2DConditionModel have all parts of what that network is told under the names of ddil's
UNet2DConditionInputs, weights in half precision, and of the gradients of all parameters a summary, computed in double precision: row i of
`gradients` holds, for parameter i in the order of their names, the norm of the gradient and its product with the vector
cos(1), cos(2), ..
The same versions write the same bytes.
"""

import json
import pathlib

import checked
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from safetensors.torch import save_file

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "models"

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

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
CROSS_MID, PLAIN_MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

# The same of UNet2DConditionModel: networks of the Stable Diffusion family in small, then what they leave out. "size" is
# that of the sample.
CONDITION_CONFIGS = {
    "unet_condition_sd15": dict(
        size=(9, 7), sample_size=8, block_out_channels=(8, 8, 16), layers_per_block=1,
        down_block_types=(CROSS_DOWN, CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP, CROSS_UP),
        attention_head_dim=4, norm_num_groups=4, cross_attention_dim=12, dropout=0.1,
    ),
    "unet_condition_sd21": dict(
        size=(8, 8), sample_size=8, block_out_channels=(8, 16), layers_per_block=(1, 2),
        down_block_types=(CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP), attention_head_dim=(2, 4),
        norm_num_groups=4, cross_attention_dim=20, use_linear_projection=True, upcast_attention=True,
        mid_block_scale_factor=1.4142,
    ),
    "unet_condition_sdxl": dict(
        size=(8, 12), sample_size=8, block_out_channels=(8, 8, 12), layers_per_block=1,
        down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP, UP),
        attention_head_dim=(1, 2, 4), norm_num_groups=4, cross_attention_dim=12, use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time", addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=46,
    ),
    "unet_condition_ssd1b": dict(
        size=(8, 8), sample_size=8, block_out_channels=(8, 8), layers_per_block=2,
        down_block_types=(DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, UP), mid_block_type=PLAIN_MID,
        attention_head_dim=(1, 2), norm_num_groups=4, cross_attention_dim=12, use_linear_projection=True,
        transformer_layers_per_block=[1, [2, 1]], reverse_transformer_layers_per_block=[[2, 1, 3], 1],
        addition_embed_type="text_time", addition_time_embed_dim=6, projection_class_embeddings_input_dim=46,
    ),
    "unet_condition_lcm": dict(
        size=(8, 8), sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=(CROSS_DOWN, DOWN), up_block_types=(UP, CROSS_UP), mid_block_type=None,
        attention_head_dim=2, norm_num_groups=4, cross_attention_dim=12, time_cond_proj_dim=16, masked=True,
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=5, freq_shift=1,
    ),
    "unet_condition_text": dict(
        size=(5, 6), sample_size=(5, 6), in_channels=2, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=(CROSS_DOWN, CROSS_DOWN), up_block_types=(CROSS_UP, CROSS_UP), attention_head_dim=2,
        only_cross_attention=(False, True), norm_num_groups=2, cross_attention_dim=12, addition_embed_type="text",
        addition_embed_type_num_heads=3, class_embed_type="projection", projection_class_embeddings_input_dim=5,
        resnet_time_scale_shift="scale_shift", time_embedding_act_fn="gelu", timestep_post_act="mish", act_fn="relu",
        time_embedding_dim=20, conv_in_kernel=1, conv_out_kernel=5, center_input_sample=True, flip_sin_to_cos=False,
        downsample_padding=0, norm_eps=1e-6,
    ),
    "unet_condition_classes": dict(
        size=(4, 4), sample_size=4, block_out_channels=(8, 8), layers_per_block=1, down_block_types=(DOWN, DOWN),
        up_block_types=(UP, CROSS_UP), attention_head_dim=4, norm_num_groups=4, cross_attention_dim=(10, 12),
        only_cross_attention=True, class_embed_type="timestep", act_fn="mish", mid_block_type=PLAIN_MID,
        transformer_layers_per_block=2,
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


def condition_inputs(config, size):
    """The conditioning, by the names of ddil's UNet2DConditionInputs."""
    batch, channels = 3, config.in_channels
    width = config.cross_attention_dim
    recorded = {
        "sample": torch.randn(batch, channels, *size),
        "timesteps": torch.tensor([999, 500, 0]),
        "encoder_hidden_states": torch.randn(batch, 5, width if isinstance(width, int) else width[0]),
    }
    if config.addition_embed_type == "text_time":
        recorded["text_embeds"] = torch.randn(batch, 10)
        recorded["time_ids"] = torch.tensor([[64.0, 48.0, 0.0, 3.0, 1024.0, 512.0]] * batch)
        recorded["time_ids"][1] += 7.0
    if config.class_embed_type == "timestep":
        recorded["class_labels"] = torch.tensor([0.5, 3.0, 7.0])
    elif config.class_embed_type is not None:
        recorded["class_labels"] = torch.randn(batch, config.projection_class_embeddings_input_dim)
    if config.time_cond_proj_dim is not None:
        recorded["guidance_weight"] = torch.tensor([7.5, 0.0, 2.25])
    return recorded


def condition_answer(model, recorded):
    """The output and the features of the bottom level."""
    features = []
    bottom = model.mid_block if model.mid_block is not None else model.down_blocks[-1]

    def keep(_module, _args, output):
        features.append(output[0] if isinstance(output, tuple) else output)

    told = {name: recorded.get(name) for name in ("class_labels", "encoder_attention_mask")}
    kind = recorded["sample"].dtype
    if "guidance_weight" in recorded:
        width = model.config.time_cond_proj_dim
        # Always in single precision, as the pipelines have it.
        weight = recorded["guidance_weight"].float()
        told["timestep_cond"] = embed_guidance(weight, width).to(kind)
    if "time_ids" in recorded:
        told["added_cond_kwargs"] = {name: recorded[name] for name in ("text_embeds", "time_ids")}
    handle = bottom.register_forward_hook(keep)
    output = model(recorded["sample"], recorded["timesteps"], recorded["encoder_hidden_states"], **told).sample
    handle.remove()
    return output, features[0]


def gradient_summary(model, recorded):
    """A row for each parameter in the order of their names."""
    double = {name: part.double() if part.is_floating_point() else part for name, part in recorded.items()}
    model = model.double()
    condition_answer(model, double)[0].square().sum().backward()
    rows = []
    for _, parameter in sorted(model.named_parameters()):
        # A parameter that the output does not depend on has none.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = gradient.flatten()
        vector = torch.arange(1, gradient.numel() + 1, dtype=torch.float64).cos()
        rows.append([gradient.norm().item(), (gradient @ vector).item()])
    return torch.tensor(rows, dtype=torch.float64)


def record_condition(name, config):
    torch.manual_seed(0)
    config = dict(config)
    size, masked = config.pop("size"), config.pop("masked", False)
    model = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # Files half the size, of the same values.
    folder = GOLDEN / name
    model.half().save_pretrained(folder)
    model = model.float()
    recorded = condition_inputs(model.config, size)
    if masked:
        recorded["encoder_attention_mask"] = torch.tensor([[True] * (5 - i) + [False] * i for i in range(3)])
    with torch.no_grad():
        output, features = condition_answer(model, recorded)
    recorded |= {"output": output, "features": features, "gradients": gradient_summary(model, recorded)}
    save_file({key: value.contiguous() for key, value in recorded.items()}, folder / "expected.safetensors")
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, output std {output.std():.3f}")


def check_condition(folder):
    model, recorded = checked.load(UNet2DConditionModel, folder)
    with torch.no_grad():
        output, _ = condition_answer(model, recorded)
    return output, recorded["output"]


def check_plain(folder):
    model, recorded = checked.load(UNet2DModel, folder)
    with torch.no_grad():
        output, _ = answer(model, recorded)
    return output, recorded["output"]


def check(folder):
    """Loads a folder that ddil wrote and compares its output with the recorded one."""
    if json.loads((folder / "config.json").read_text())["_class_name"] == "UNet2DConditionModel":
        output, expected = check_condition(folder)
    else:
        output, expected = check_plain(folder)
    checked.compare(folder.name, output, expected)


def record_all():
    for name, config in CONFIGS.items():
        record(name, config)
    for name, config in CONDITION_CONFIGS.items():
        record_condition(name, config)


def main():
    checked.run(checked.arguments(__doc__), check, record_all)


if __name__ == "__main__":
    main()
