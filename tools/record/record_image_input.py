#!/usr/bin/env python3
"""Records tests/golden/metrics/image_input.json: images as clean-fid, pytorch-fid, torch-fidelity and CLIP resize them.

    python3 -m pip install torch==2.13.0 torchvision==0.28.0 clean-fid==0.1.35 torch-fidelity==0.4.0 pillow numpy
    python3 tools/record/record_image_input.py

Small sizes stand for 299x299: each function takes the size as an argument. Values are those before a network's own
normalization.
"""

import json
import pathlib

import numpy as np
import torch
from cleanfid.resize import build_resizer, make_resizer  # noqa: F401
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/metrics/image_input.json"


def clean_fid(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # The function takes width and height.
    return make_resizer("PIL", False, "bicubic", (size[1], size[0]))(image)


def pytorch_fid(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    images = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return (2 * resized - 1)[0].permute(1, 2, 0).numpy()


def torch_fidelity(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    images = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return interpolate_bilinear_2d_like_tensorflow1x(images, size=size, align_corners=False)[0].permute(1, 2, 0).numpy()


def clip(image: np.ndarray, side: int, crop: int) -> np.ndarray:
    """Bytes: PIL rounds after each direction, which floats do not."""
    height, width = image.shape[:2]
    size = (side, side * width // height) if height <= width else (side * height // width, side)
    resized = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.BICUBIC))
    top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
    return resized[top : top + crop, left : left + crop].astype(np.float32)


def main() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for height, width in [(5, 8), (12, 7), (9, 9)]:
        # Rough enough that bicubic interpolation leaves the range.
        image = (rng.random((height, width, 3)) > 0.5).astype(np.uint8) * 200 + rng.integers(0, 56, (height, width, 3)).astype(np.uint8)
        for size in [(6, 4), (11, 13)]:
            cases.append(
                {
                    "image": image.tolist(),
                    "size": size,
                    "clean_fid": clean_fid(image, size).astype(float).tolist(),
                    "pytorch_fid": pytorch_fid(image, size).astype(float).tolist(),
                    "torch_fidelity": torch_fidelity(image, size).astype(float).tolist(),
                }
            )
        for side, crop in [(6, 4), (12, 12)]:
            cases.append({"image": image.tolist(), "side": side, "crop": crop, "clip": clip(image, side, crop).tolist()})
    OUT.write_text(json.dumps({"cases": cases}) + "\n")
    print(f"{OUT}: {len(cases)} cases")


if __name__ == "__main__":
    main()
