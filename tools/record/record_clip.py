#!/usr/bin/env python3
"""Records outputs of transformers' CLIP for tests/models/clip.

    python3 -m venv .venv
    .venv/bin/pip install torch==2.13.0 transformers==5.24.0 safetensors numpy pillow
    .venv/bin/python tools/record/record_clip.py            # writes tests/golden/models/clip_*
    .venv/bin/python tools/record/record_clip.py --check DIR...  # loads folders that ddil wrote

Networks are small and random. Each of their folders holds what `save_pretrained` writes and `expected.safetensors`. The
vocabulary is made from the sentences below in the way CLIP's was: the 256 bytes, the same at the end of a word, merges of
frequent pairs, two marks. It is kept three times: as Stable Diffusion keeps it, as Stable Diffusion XL's second encoder
does, padded with "!", and as the one `tokenizer.json` of transformers 5. `expected.json` has prompts and their tokens.
The same versions write the same bytes.
"""

import collections
import json
import pathlib

import checked
import numpy
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "models"
START, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 60

SENTENCES = """
a photo of a cat and a photo of a dog, the cat is sitting on a red chair
a painting of the sea at night, oil on canvas, highly detailed, trending
it's a portrait of an old man, they're walking, we've seen that you'll not, i'd say i'm there
a bag, a coat, a dress, a pullover, a sandal, a shirt, a sneaker, trousers, an ankle boot
the quick brown fox jumps over the lazy dog in 1999 and 2024
""".split()

PROMPTS = [
    "",
    " ",
    "a photo of a cat",
    "A PHOTO of a CaT!",
    "it's they're we've I'd you'll I'm can't 'tis rock'n'roll",
    "  weird \t white\n\nspace\u00a0here\u3000and\u2009there\r\n  ",
    "1999 and 2024, 3.14159 or 10,000; half is \u00bd, \u2163 is four, \u0664 too",
    "na\u00efve caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m A\u030angstr\u00f6m \u0130stanbul STRASSE stra\u00dfe \ufb01sh",
    "\u732b\u306e\u5199\u771f \u043a\u043e\u0448\u043a\u0430 \u05d7\u05ea\u05d5\u05dc \u0642\u0637\u0629 \u0e41\u0e21\u0e27 \uace0\uc591\uc774",
    "emoji \U0001f600\U0001f44d\U0001f3fd\u200d\U0001f680 family \U0001f468\u200d\U0001f469\u200d\U0001f467 heart \u2764\ufe0f",
    "!!! ... ?!?! --- ___ (((cat))) [dog:1.3] {a|b} #tag @name $5 100% a/b\\c ~`^*+=<>",
    "a &amp; b &lt;br&gt; &quot;cat&quot; &#39;dog&#39; &nbsp;",
    "<|startoftext|>cat<|endoftext|> dog <|EndOfText|> <|endoftext |>",
    "it!is a!",
    "zero\u200bwidth soft\u00adhyphen \u0007bell \u007f \ufeffbom \u0085next",
    "'S 'T 'RE it'S",
    "\u0391\u03a3 \u01c5 \u01f0 \U0001d4d0\U0001d4d1 \U00010400 e\u0301\u0323",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "a photo of a cat, " * 20,
    "\u732b" * 60,
    "cat " * 75,
    "cat " * 76,
]


def words():
    """The sentences' words as CLIP splits them: symbols of bytes, the last one marked."""
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    counts = collections.Counter(SENTENCES)
    spelt = {}
    for word, count in sorted(counts.items()):
        letters = list(symbols.pre_tokenize_str(word)[0][0])
        spelt[(*letters[:-1], letters[-1] + "</w>")] = count
    return spelt


def merged(word, pair):
    out, i = [], 0
    while i < len(word):
        joined = word[i : i + 2] == pair
        out.append("".join(pair) if joined else word[i])
        i += 2 if joined else 1
    return tuple(out)


def learn_merges():
    spelt, merges = words(), []
    for _ in range(NUM_MERGES):
        pairs = collections.Counter()
        for word, count in spelt.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(pair)
        spelt = {merged(word, pair): count for word, count in spelt.items()}
    return merges


def byte_symbols():
    """The characters that represent the bytes, "!" first, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def vocabulary(merges):
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    assert len(set(tokens)) == len(tokens)
    return {token: i for i, token in enumerate(tokens)}


def marked(content):
    """As older releases wrote it."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder, vocab, merges, pad):
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    folder.joinpath("merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": marked(START), "eos_token": marked(END), "unk_token": marked(END)}
    config = {
        "add_prefix_space": False, **special, "pad_token": pad, "do_lower_case": True, "errors": "replace",
        "model_max_length": 77, "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    plain = {key: {k: v for k, v in value.items() if k != "__type"} for key, value in special.items()}
    write_json(folder / "special_tokens_map.json", {**plain, "pad_token": pad})


def record_tokens(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    encoded = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True)
    whole = tokenizer(PROMPTS).input_ids
    write_json(folder / "expected.json", [
        {"prompt": prompt, "input_ids": ids, "attention_mask": mask, "num_cut": max(0, len(long) - 77)}
        for prompt, ids, mask, long in zip(PROMPTS, encoded.input_ids, encoded.attention_mask, whole)
    ])
    return tokenizer


def record_tokenizers():
    merges = learn_merges()
    vocab = vocabulary(merges)
    write_tokenizer(GOLDEN / "clip_tokenizer", vocab, merges, END)
    write_tokenizer(GOLDEN / "clip_tokenizer_2", vocab, merges, "!")
    tokenizer = record_tokens(GOLDEN / "clip_tokenizer")
    padded = record_tokens(GOLDEN / "clip_tokenizer_2")
    padded.save_pretrained(GOLDEN / "clip_tokenizer_json")
    record_tokens(GOLDEN / "clip_tokenizer_json")
    print(f"{len(vocab)} tokens")
    return tokenizer, padded


def scatter(model):
    """Away from fresh norms and biases, which would hide one that is left out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 0:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save(folder, model, recorded):
    model.save_pretrained(folder)
    save_file({key: value.detach().contiguous() for key, value in recorded.items()}, folder / "expected.safetensors")
    print(f"{folder.name}: {sum(p.numel() for p in model.parameters())} parameters")


def text_settings(vocab_size, **changes):
    settings = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        hidden_act="quick_gelu", bos_token_id=0, eos_token_id=2, pad_token_id=1, projection_dim=32,
    )
    return settings | changes


def text_inputs(tokenizer):
    prompts = ["a photo of a cat", "", "it's a portrait of an old man, 1999!"]
    encoded = tokenizer(prompts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def text_answers(model, input_ids, attention_mask):
    recorded = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name, mask in [("", None), ("masked.", attention_mask)]:
        output = model(input_ids, attention_mask=mask, output_hidden_states=True)
        recorded[f"{name}last_hidden_state"] = output.last_hidden_state
        for i, state in enumerate(output.hidden_states):
            recorded[f"{name}hidden_states.{i}"] = state
        if isinstance(model, CLIPTextModel):
            recorded[f"{name}pooled"] = output.pooler_output
        else:
            recorded[f"{name}text_embeds"] = output.text_embeds
    return recorded


def record_text(name, cls, settings, tokenizer):
    torch.manual_seed(0)
    model = scatter(cls(CLIPTextConfig(**settings)))
    recorded = text_answers(model, *text_inputs(tokenizer))
    final = recorded["last_hidden_state"]
    final.square().sum().backward()
    parameters = dict(model.named_parameters())
    for key in ["embeddings.position_embedding.weight", "encoder.layers.0.self_attn.k_proj.weight",
                "encoder.layers.2.mlp.fc1.bias", "final_layer_norm.weight"]:
        short = key if key in parameters else f"text_model.{key}"
        recorded[f"grad.text_model.{key}"] = parameters[short].grad
    save(GOLDEN / name, model, recorded)


def vision_settings(**changes):
    settings = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=8,
        projection_dim=24,
    )
    return settings | changes


def record_vision():
    torch.manual_seed(0)
    model = scatter(CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_settings(hidden_act="gelu"))))
    pixels = torch.randn(2, 3, 28, 28)
    output = model(pixels)
    inner = model.vision_model(pixels)
    save(GOLDEN / "clip_vision", model, {
        "pixel_values": pixels, "image_embeds": output.image_embeds, "last_hidden_state": output.last_hidden_state,
        "pooled": inner.pooler_output,
    })


def preprocess(picture, size):
    """CLIP's preprocessing of an [h, w, 3] array in [0, 255], without rounding to 8 bits."""
    height, width, _ = picture.shape
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    prepared = []
    for channel in range(3):
        values = picture[..., channel].astype(numpy.float32)
        # Width, then height, as Pillow does it with 8 bits.
        for shape in [(width, values.shape[0]), (width, height)]:
            image = Image.fromarray(values, mode="F").resize(shape, Image.Resampling.BICUBIC)
            values = numpy.asarray(image).clip(0, 255)
        prepared.append(values)
    resized = numpy.stack(prepared)
    top, left = (height - size) // 2, (width - size) // 2
    cut = resized[:, top : top + size, left : left + size] / 255
    processor = CLIPImageProcessorPil()
    mean, std = numpy.array(processor.image_mean), numpy.array(processor.image_std)
    return torch.tensor((cut - mean[:, None, None]) / std[:, None, None], dtype=torch.float32)


def pictures():
    """Two images of each shape: hard edges and noise."""
    generator = numpy.random.default_rng(0)
    for height, width in [(45, 61), (33, 20), (28, 28)]:
        rows, columns = numpy.mgrid[:height, :width]
        board = ((rows // 5 + columns // 7) % 2 * 255)[..., None].repeat(3, axis=2)
        yield numpy.stack([board, generator.integers(0, 256, (height, width, 3))]).astype(numpy.uint8)


def record_score(tokenizer):
    torch.manual_seed(0)
    text = text_settings(len(tokenizer), num_hidden_layers=2, hidden_size=16, intermediate_size=24)
    config = CLIPConfig(text_config=text, vision_config=vision_settings(hidden_size=24), projection_dim=20)
    model = scatter(CLIPModel(config))
    prompts = ["a photo of a dog", "a red chair at night, 2024"]
    # As the network was trained, and as Stable Diffusion's pipelines call it.
    encoded = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    recorded = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
    )
    for i, pair in enumerate(pictures()):
        images = torch.tensor(pair).permute(0, 3, 1, 2)
        pixels = torch.stack([preprocess(picture, 28) for picture in pair])
        rounded = processor(images=list(pair), return_tensors="pt").pixel_values
        recorded |= {f"{i}.images": images, f"{i}.pixel_values": pixels, f"{i}.rounded_pixel_values": rounded}
        for name, values in [("", pixels), ("rounded_", rounded)]:
            output = model(pixel_values=values, **encoded)
            cosines = output.logits_per_image.diagonal() / model.logit_scale.exp()
            recorded[f"{i}.{name}cosines"] = cosines
    save(GOLDEN / "clip", model, recorded)


def check(folder):
    """Loads a folder that ddil wrote and compares its output with the recorded one."""
    config = json.loads((folder / "config.json").read_text())
    cls = {c.__name__: c for c in (CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection)}[
        config["architectures"][0]
    ]
    model, recorded = checked.load(cls, folder)
    argument = "pixel_values" if "pixel_values" in recorded else "input_ids"
    with torch.no_grad():
        found = model(recorded[argument]).last_hidden_state
    checked.compare(folder.name, found, recorded["last_hidden_state"])


def record_all():
    tokenizer, padded = record_tokenizers()
    size = len(tokenizer)
    record_text("clip_text", CLIPTextModel, text_settings(size), tokenizer)
    record_text("clip_text_with_projection", CLIPTextModelWithProjection, text_settings(
        size, hidden_act="gelu", eos_token_id=size - 1, bos_token_id=size - 2, pad_token_id=0, projection_dim=24,
        num_attention_heads=2, layer_norm_eps=1e-3,
    ), padded)
    record_vision()
    record_score(tokenizer)


def main():
    checked.run(checked.arguments(__doc__), check, record_all)


if __name__ == "__main__":
    main()
