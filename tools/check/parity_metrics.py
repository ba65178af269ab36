#!/usr/bin/env python3
"""Compares `ddil evaluate` with pytorch-fid, clean-fid, torch-fidelity, prdc, torchmetrics and transformers on the same files.

    make parity                                            # installs them into the user's cache, builds, runs this
    python tools/check/parity_metrics.py --ddil PROGRAM     # with packages of your own; PROGRAM is the built `ddil`
    python tools/check/parity_metrics.py --ddil PROGRAM --speed 2000    # also the time of features of 2000 JPEG files

The Inception network is pytorch-fid's with random weights, its normalization fitted to random images: parity does not
depend on the weights. The images are smooth random fields of mixed sizes, as PNG and JPEG files; a third as many are
compared of PNG alone, and of JPEG alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytorch_fid.fid_score
import pytorch_fid.inception
import torch
import torch_fidelity
import torchvision
from cleanfid import fid as clean_fid
from PIL import Image
from prdc import compute_prdc
from safetensors.numpy import load_file
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.functional.multimodal.clip_score import _clip_score_update
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

FRECHET, NEIGHBOURS, CLIP = 1e-3, 1e-6, 1e-4
GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "models"
# As the published networks describe their images.
DINOV2_IMAGES = BitImageProcessorPil(
    size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
)
SIZES = [(64, 64), (80, 120), (131, 97), (256, 256), (299, 299), (320, 200)]


def inception() -> tuple[torch.nn.Module, dict]:
    """pytorch-fid's network with random weights and fitted normalization, and its weights by their published names."""
    torch.manual_seed(0)
    module, own, built = pytorch_fid.inception, torchvision.models.Inception3.load_state_dict, []
    module.load_state_dict_from_url = lambda *_, **__: None
    torchvision.models.Inception3.load_state_dict = lambda network, _: built.append(network)
    try:
        network = module.InceptionV3([3], resize_input=False, normalize_input=False, requires_grad=False)
    finally:
        torchvision.models.Inception3.load_state_dict = own
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    network.train()
    with torch.no_grad():
        batch = np.stack([np.asarray(field(np.random.default_rng(seed), (299, 299))) for seed in range(16)])
        network(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1)
    return network.eval(), built[0].eval().state_dict()


class Signed(torch.nn.Module):
    """Features of images from -1 to 1."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[0].flatten(1)


class Bytes(torch.nn.Module):
    """Features of images from 0 to 255, with the argument of `inception-2015-12-05.pt`."""

    def __init__(self, features: torch.nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = self.features((images - 128) / 128)
        return features if return_features else features[:, :1008]


def field(rng: np.random.Generator, size: tuple[int, int], shift: float = 0.0) -> Image.Image:
    """A smooth random image with edges."""
    coarse = rng.normal(size=(6, 6, 3))
    levels = np.stack([np.asarray(Image.fromarray(coarse[..., c].astype(np.float32)).resize(size, Image.BICUBIC)) for c in range(3)], -1)
    levels = levels + (levels[..., :1] > 0.3) * rng.normal(size=3) + rng.normal(size=levels.shape) * 0.15
    return Image.fromarray(np.clip(128 + 50 * (levels + shift), 0, 255).astype(np.uint8))


def draw(folder: pathlib.Path, count: int, seed: int, kinds: tuple[str, ...], shift: float, sizes=SIZES) -> None:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(count):
        image = field(rng, sizes[index % len(sizes)], shift)
        kind = kinds[index // len(sizes) % len(kinds)]
        image.save(folder / f"{index:04}.{kind}", **({"quality": 90} if kind == "jpg" else {}))


class Ddil:
    def __init__(self, program: str, work: pathlib.Path) -> None:
        self.program, self.work = program, work

    def run(self, subject: pathlib.Path, network: pathlib.Path | str, given: str | None, *more: str) -> None:
        command = [self.program, "evaluate", str(subject), "--extractor", str(network), *more]
        command += ["--extractor-input", given] if given else []
        outcome = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if outcome.returncode != 0:
            sys.exit(f"error: {' '.join(command)} ended with {outcome.returncode}:\n{outcome.stdout}")

    def evaluate(self, subject: pathlib.Path, reference: pathlib.Path, network: pathlib.Path, given: str, *more: str) -> dict:
        answer = self.work / "answer.json"
        answer.unlink(missing_ok=True)
        self.run(subject, network, given, "--reference", str(reference), "--json", str(answer), *more)
        return json.loads(answer.read_text())[0]

    def features(self, subject: pathlib.Path, network: pathlib.Path | str, given: str | None, *more: str) -> np.ndarray:
        saved = self.work / "saved.safetensors"
        saved.unlink(missing_ok=True)
        self.run(subject, network, given, "--save-statistics", str(saved), *more)
        return load_file(saved)["features"]


class Rows:
    def __init__(self) -> None:
        self.failed = 0
        print("\n| images | tool, resize | metric | theirs | ddil | error | bound |\n| --- | --- | --- | --- | --- | --- | --- |")

    def add(self, images: str, tool: str, metric: str, theirs: float, ours: float, bound: float) -> None:
        error = abs(ours - theirs) / (abs(theirs) or 1)
        word = "" if error <= bound else " FAILED"
        self.failed += error > bound
        print(f"| {images} | {tool} | {metric} | {theirs:.8g} | {ours:.8g} | {error:.1e}{word} | {bound:.0e} |", flush=True)


def largest_gap(found: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of the rows `theirs` from the closest of `found`: saved features are in a random order."""
    return max(np.abs(found - row).max(axis=1).min() for row in theirs)


def decoders(rows: Rows, ddil: Ddil, work: pathlib.Path) -> None:
    """Differences of decoded pixels from Pillow's."""
    for subsampling, name in ((0, "colours at full resolution"), (1, "colours at half the width"), (2, "colours at half the size")):
        folder = work / f"decoded-{subsampling}"
        folder.mkdir()
        for index in range(16):
            image = field(np.random.default_rng(index), (48, 48))
            image.save(folder / f"{index:02}.jpg", quality=90, subsampling=subsampling)
        theirs = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1).ravel() for path in sorted(folder.iterdir())])
        gap = largest_gap((ddil.features(folder, "raw_pixels", None) + 1) * 127.5, theirs)
        rows.add("16 jpg", f"Pillow, {name}", "largest difference in levels", 0, gap, 1e-3)


def fidelity(weights: pathlib.Path, drawn: pathlib.Path, real: pathlib.Path, count: int) -> dict:
    return torch_fidelity.calculate_metrics(
        input1=str(drawn), input2=str(real), cuda=False, fid=True, kid=True, batch_size=1, kid_subsets=1, kid_subset_size=count,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True, verbose=False, cache=False,
    )  # fmt: skip


def compare(rows: Rows, ddil: Ddil, work: pathlib.Path, kinds: tuple[str, ...], count: int, networks: dict) -> None:
    title = f"{count} {'+'.join(kinds)}"
    drawn, real = work / f"drawn-{'-'.join(kinds)}", work / f"real-{'-'.join(kinds)}"
    draw(drawn, count, 1, kinds, 0.2)
    draw(real, count, 2, kinds, 0.0)
    signed, scripted, state = networks["signed"], networks["bytes"], networks["state"]

    pytorch = pytorch_fid.fid_score
    # Its batches need equal sizes; one image has one.
    statistics = [pytorch.compute_statistics_of_path(str(path), networks["pytorch_fid"], 1, 2048, "cpu", 1) for path in (drawn, real)]
    theirs = pytorch.calculate_frechet_distance(*statistics[0], *statistics[1])
    ours = ddil.evaluate(drawn, real, signed, "pytorch-fid")
    rows.add(title, "pytorch-fid, bilinear", "FID", theirs, ours["frechet"], FRECHET)

    network = networks["network"]
    clean = lambda batch: Signed(network)((batch - 128) / 128)  # noqa: E731
    features = [
        clean_fid.get_folder_features(str(path), model=clean, num_workers=0, batch_size=32, device=torch.device("cpu"), mode="clean", verbose=False)
        for path in (drawn, real)
    ]
    theirs = clean_fid.fid_from_feats(*features)
    ours = ddil.evaluate(drawn, real, scripted, "clean-fid", "--return-features")
    rows.add(title, "clean-fid, PIL bicubic", "FID", theirs, ours["frechet"], FRECHET)
    found = [ddil.features(path, scripted, "clean-fid", "--return-features") for path in (drawn, real)]
    for name, k in (("precision", 3), ("recall", 3), ("density", 5), ("coverage", 5)):
        # On our features, so that the metric alone is compared.
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = compute_prdc(real_features=found[1].astype(np.float64), fake_features=found[0].astype(np.float64), nearest_k=k)[name]
        rows.add(title, "prdc", name, theirs, ours[name], NEIGHBOURS)

    theirs = fidelity(state, drawn, real, count)
    ours = ddil.evaluate(drawn, real, scripted, "torch-fidelity", "--return-features")
    rows.add(title, "torch-fidelity, TensorFlow 1 bilinear", "FID", theirs["frechet_inception_distance"], ours["frechet"], FRECHET)
    rows.add(title, "torch-fidelity, TensorFlow 1 bilinear", "KID", theirs["kernel_inception_distance_mean"], ours["kid"], 5 * FRECHET)


class Tensors(torch.nn.Module):
    """CLIP as torchmetrics calls it: transformers 5 returns an object where it expects a tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(*inputs).pooler_output

    def get_text_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(*inputs).pooler_output


def networks_of_transformers(work: pathlib.Path) -> tuple[pathlib.Path, Tensors, CLIPProcessor, pathlib.Path, Dinov2Model]:
    """Random networks with the published sizes of images and patches, in folders as published."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(GOLDEN / "clip_tokenizer")
    narrow = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**narrow, "vocab_size": len(tokenizer), "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**narrow, "image_size": 224, "patch_size": 32}, projection_dim=64)
    clip = CLIPModel(config).eval()
    processor = CLIPProcessor(CLIPImageProcessorPil(), tokenizer)
    folders = work / "clip", work / "dinov2"
    dinov2 = Dinov2Model(Dinov2Config(**{k: v for k, v in narrow.items() if k != "intermediate_size"}, image_size=518)).eval()
    for model, saved, folder in ((clip, processor, folders[0]), (dinov2, DINOV2_IMAGES, folders[1])):
        model.save_pretrained(folder)
        saved.save_pretrained(folder)
    tokenizer.save_pretrained(folders[0])
    return folders[0], Tensors(clip), processor, folders[1], dinov2


def prompted(rows: Rows, ddil: Ddil, work: pathlib.Path, count: int) -> None:
    """CLIP score, and features of CLIP and DINOv2 of PNG and JPEG files of mixed sizes, two images per prompt."""
    clip, model, processor, dinov2_folder, dinov2 = networks_of_transformers(work)
    images = work / "prompted"
    draw(images, count, 4, ("png", "jpg"), 0.0)
    files = sorted(images.iterdir())
    words = "a photo of a cat and a dog sitting on the red chair painting sea at night".split()
    rng = np.random.default_rng(5)
    captions = [" ".join(rng.choice(words, 6)) for _ in range(count // 2)]
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(captions) + "\n")
    loaded = [torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1) for path in files]
    title = f"{count} png+jpg"

    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    ddil.run(images, clip, None, "--prompts", str(prompts), "--clip", str(clip), "--json", str(answer))
    ours = json.loads(answer.read_text())[0]
    with torch.no_grad():
        each = [caption for caption in captions for _ in range(2)]
        cosines = _clip_score_update(loaded, each, model, processor)[0] / 100
        theirs = clip_score(loaded, each, lambda: (model, processor)).item()
    rows.add(title, "torchmetrics, transformers", "CLIP score", theirs, ours["clip_score"]["torchmetrics"], CLIP)
    rows.add(title, "torchmetrics, transformers", "mean cosine", cosines.mean().item(), ours["clip_score"]["cosine"]["mean"], CLIP)
    with torch.no_grad():
        pixels = torch.cat([processor.image_processor(image, return_tensors="pt").pixel_values for image in loaded])
        embeds = model.get_image_features(pixels).double()
        pairs = embeds.view(-1, 2, embeds.shape[1])
        theirs = (pairs[:, 0] - pairs[:, 1]).norm(dim=1).mean().item()
        rows.add(title, "transformers", "distance of CLIP embeddings per prompt", theirs, ours["diversity"]["euclidean"]["mean"], CLIP)
        theirs = 1 - torch.nn.functional.cosine_similarity(pairs[:, 0], pairs[:, 1]).mean().item()
        rows.add(title, "transformers", "cosine distance per prompt", theirs, ours["diversity"]["clip_cosine_distance"]["mean"], CLIP)
        pixels = torch.cat([DINOV2_IMAGES(image, return_tensors="pt").pixel_values for image in loaded])
        features = dinov2(pixels).pooler_output.numpy()
    found = ddil.features(images, dinov2_folder, None)
    theirs, error = np.abs(features).max(), largest_gap(found, features)
    rows.add(title, "transformers", "DINOv2 features, largest difference", theirs, theirs + error, CLIP)


def speed(ddil: Ddil, work: pathlib.Path, count: int, networks: dict, rounds: int) -> None:
    folder = work / "speed"
    draw(folder, count, 3, ("jpg",), 0.0, [(256, 256)])
    threads = torch.get_num_threads()
    print(f"\nfeatures of {count} JPEG files of 256x256 pixels, {threads} threads, {rounds} rounds")
    for _ in range(rounds):
        begun = time.perf_counter()
        pytorch_fid.fid_score.compute_statistics_of_path(str(folder), networks["pytorch_fid"], 50, 2048, "cpu", threads)
        theirs = time.perf_counter() - begun
        begun = time.perf_counter()
        ddil.features(folder, networks["signed"], "pytorch-fid", "--threads", str(threads))
        ours = time.perf_counter() - begun
        print(f"pytorch-fid {theirs:.1f} s, ddil {ours:.1f} s, ratio {ours / theirs:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ddil", required=True, help="the built program")
    parser.add_argument("--images", type=int, default=300, help="images on each side (default 300)")
    parser.add_argument("--speed", type=int, default=0, metavar="COUNT", help="also time features of so many JPEG files")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        network, weights = inception()
        files = {"signed": work / "signed.pt", "bytes": work / "bytes.pt", "state": work / "state.pth"}
        with torch.no_grad():
            signed = torch.jit.trace(Signed(network).eval(), torch.zeros(2, 3, 299, 299), check_trace=False)
            signed.save(files["signed"])
            torch.jit.script(Bytes(signed).eval()).save(files["bytes"])
        torch.save(weights, files["state"])
        # As pytorch-fid uses it: images from 0 to 1 of any size.
        resized = copy.deepcopy(network)
        resized.resize_input = resized.normalize_input = True
        networks = {**files, "network": network, "pytorch_fid": resized}
        ddil = Ddil(options.ddil, work)
        rows = Rows()
        decoders(rows, ddil, work)
        compare(rows, ddil, work, ("png", "jpg"), options.images, networks)
        compare(rows, ddil, work, ("png",), options.images // 3, networks)
        compare(rows, ddil, work, ("jpg",), options.images // 3, networks)
        prompted(rows, ddil, work, options.images // 3 // 2 * 2)
        if options.speed:
            speed(ddil, work, options.speed, networks, options.rounds)
    if rows.failed:
        print(f"error: {rows.failed} metrics differ by more than their bound", file=sys.stderr)
    return int(rows.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
