#!/usr/bin/env python3
"""Records Pillow's decoding of JPEG files for tests/data/pictures.rs.

    python3 -m venv .venv
    .venv/bin/pip install pillow==13.0.0 numpy
    .venv/bin/python tools/record/record_pictures.py    # writes tests/golden/pictures

Every JPEG has a PNG of the same name with Pillow's decoding, oriented by its Exif data, except `cmyk.jpg`, which is
refused. The same versions write the same bytes.
"""

import pathlib

import numpy
from PIL import ExifTags, Image, ImageOps

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "pictures"
# The transformation that each orientation undoes.
LAID_DOWN = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}


def picture():
    """24 wide and 16 high; the four corners differ."""
    rows, columns = numpy.mgrid[0:16, 0:24]
    red, green, blue = 10 * columns, 15 * rows, 5 * columns + 8 * rows
    return Image.fromarray(numpy.stack([red, green, blue], -1).astype(numpy.uint8))


def record(name, image, **settings):
    path = GOLDEN / f"{name}.jpg"
    image.save(path, quality=90, **settings)
    if image.mode != "CMYK":
        ImageOps.exif_transpose(Image.open(path)).save(GOLDEN / f"{name}.png")


def main():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    shown = picture()
    for orientation, way in LAID_DOWN.items():
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        record(f"turned_{orientation}", shown if way is None else shown.transpose(way), exif=exif, subsampling=0)
    record("grey", shown.convert("L"))
    record("progressive", shown, progressive=True, subsampling=2)
    # Odd sizes: the last column and row of the colours cover one pixel.
    odd = shown.crop((0, 0, 21, 13))
    record("half_width", odd, subsampling=1)
    record("half_size", odd, subsampling=2)
    record("cmyk", shown.convert("CMYK"))
    sizes = [Image.open(path).size for path in sorted(GOLDEN.glob("turned_*.png"))]
    assert set(sizes) == {shown.size}, sizes


if __name__ == "__main__":
    main()
