#!/usr/bin/env python3
"""Records the CLIP scores of torchmetrics for crates/ddil/tests/program/evaluate_prompts.rs.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==5.24.0 torchmetrics==1.9.0 safetensors pillow
    .venv/bin/python tools/record/record_clip_score.py    # writes tests/golden/metrics/clip_score.json

Images are resized by PIL. The network, the images and the captions are those of tests/golden/models/clip; record_clip.py makes them.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.functional.multimodal.clip_score import _clip_score_update
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
PROMPTS = ["a photo of a dog", "a red chair at night, 2024"]


class Tensors(torch.nn.Module):
    """CLIP as torchmetrics calls it: transformers 5 returns an object where it expects a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs):
        return self.model.get_image_features(*inputs).pooler_output

    def get_text_features(self, *inputs):
        return self.model.get_text_features(*inputs).pooler_output


def main():
    torch.set_num_threads(1)
    model = Tensors(CLIPModel.from_pretrained(GOLDEN / "models" / "clip").eval())
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = CLIPProcessor(image_processor, CLIPTokenizer.from_pretrained(GOLDEN / "models" / "clip_tokenizer"))
    recorded = load_file(GOLDEN / "models" / "clip" / "expected.safetensors")
    scores = []
    with torch.no_grad():
        for i in range(3):
            images = list(recorded[f"{i}.images"])
            each, _ = _clip_score_update(images, PROMPTS, model, processor)
            scores.append({
                "clip_score": clip_score(images, PROMPTS, lambda: (model, processor)).item(),
                "before the maximum": each.mean().item(),
            })  # fmt: skip
    path = GOLDEN / "metrics" / "clip_score.json"
    path.write_text(json.dumps({"prompts": PROMPTS, "scores": scores}, indent=1) + "\n")
    print(scores)


if __name__ == "__main__":
    main()
