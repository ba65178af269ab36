#!/usr/bin/env python3
"""Records outputs of transformers' DINOv2 for tests/models/dinov2.rs.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==5.24.0 safetensors numpy pillow
    .venv/bin/python tools/record/record_dinov2.py            # writes tests/golden/models/dinov2*
    .venv/bin/python tools/record/record_dinov2.py --check DIR...  # loads folders that ddil wrote

Networks are small and random. Each of their folders holds what `save_pretrained` writes, the published settings of the
images, and `expected.safetensors`: outputs at the size of the position embeddings and at two others, and images with
what transformers makes of them. The same versions write the same bytes.
"""

import checked
import torch
from record_clip import GOLDEN, pictures, scatter
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

# As in the published networks, for smaller images.
PROCESSOR = dict(
    size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
)  # fmt: skip


def record(name, **changes):
    torch.manual_seed(0)
    settings = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7)
    model = scatter(Dinov2Model(Dinov2Config(**settings | changes)))
    processor = BitImageProcessorPil(**PROCESSOR)
    recorded = {}
    with torch.no_grad():
        for key, size in [("", (28, 28)), ("smaller.", (21, 16)), ("larger.", (35, 63))]:
            pixels = torch.randn(2, 3, *size)
            output = model(pixels)
            recorded[f"{key}pixel_values"] = pixels
            recorded[f"{key}last_hidden_state"] = output.last_hidden_state
            recorded[f"{key}pooled"] = output.pooler_output
        for i, pair in enumerate(pictures()):
            pixels = processor(images=list(pair), return_tensors="pt").pixel_values
            recorded[f"{i}.images"] = torch.tensor(pair).permute(0, 3, 1, 2).contiguous()
            recorded[f"{i}.pixel_values"] = pixels
            recorded[f"{i}.pooled"] = model(pixels).pooler_output
    folder = GOLDEN / name
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file({key: value.contiguous() for key, value in recorded.items()}, folder / "expected.safetensors")
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters")


def check(folder):
    """Loads a folder that ddil wrote and compares its output with the recorded one."""
    model, recorded = checked.load(Dinov2Model, folder)
    with torch.no_grad():
        found = model(recorded["pixel_values"]).last_hidden_state
    checked.compare(folder.name, found, recorded["last_hidden_state"])


def record_all():
    record("dinov2")
    record("dinov2_gated", use_swiglu_ffn=True, qkv_bias=False, use_mask_token=False, num_attention_heads=2)


def main():
    checked.run(checked.arguments(__doc__), check, record_all)


if __name__ == "__main__":
    main()
