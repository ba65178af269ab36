"""diffusers' text-to-image U-Nets: the cases of benches/network_times.rs."""

import pathlib

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


class Batch:
    def __init__(self, shape, width, kind):
        self.sample = torch.randn(shape).to(kind)
        self.timesteps = torch.full((shape[0],), 501)
        self.states = torch.randn(shape[0], 77, width).to(kind)

    def channels_last(self):
        self.sample = self.sample.to(memory_format=torch.channels_last)

    def ask(self, network):
        return network(self.sample, self.timesteps, self.states, return_dict=False)[0]


def placed(network, batch, channels_last):
    if channels_last:
        network.to(memory_format=torch.channels_last)
        batch.channels_last()
    return network


def forward(bfloat16, channels_last):
    kind = torch.bfloat16 if bfloat16 else torch.float32
    # The settings of Stable Diffusion 1.5 are the defaults except for these.
    network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().to(kind)
    batch = Batch((1, 4, 64, 64), 768, kind)
    network = placed(network, batch, channels_last).requires_grad_(False)

    @torch.no_grad()
    def run():
        batch.ask(network)

    return run


def training_step(bfloat16, channels_last):
    network = UNet2DConditionModel(
        block_out_channels=(64, 128, 128), layers_per_block=1, attention_head_dim=4, cross_attention_dim=256,
        down_block_types=(CROSS_DOWN, CROSS_DOWN, "DownBlock2D"), up_block_types=("UpBlock2D", CROSS_UP, CROSS_UP),
    ).train()
    batch = Batch((8, 4, 32, 32), 256, torch.float32)
    network = placed(network, batch, channels_last)
    noise = torch.randn_like(batch.sample)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def run():
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = batch.ask(network)
        loss = (output.float() - noise).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def weights_in(folder):
    """Every tensor of the file, in place."""
    return load_file(pathlib.Path(folder) / "diffusion_pytorch_model.safetensors")


def load(folder):
    """Loads files into parameters in the fastest way: without initialising values first, and without a second copy."""
    with torch.device("meta"):
        empty = UNet2DConditionModel(**UNet2DConditionModel.load_config(folder))

    def run():
        network = empty.to_empty(device="cpu")
        network.load_state_dict(weights_in(folder))

    return run


def case(name, folder=None):
    how = {"bfloat16": "bfloat16" in name, "channels_last": name.endswith("channels last")}
    what = name.split(",")[0]
    if what == "open":
        return lambda: weights_in(folder)
    if what == "load":
        return load(folder)
    return {"forward": forward, "training step": training_step}[what](**how)
