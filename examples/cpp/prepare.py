"""Writes photographs as the PPM files that `classify` reads: resized and cropped as the package says, not normalised.

usage: prepare.py PACKAGE.pt2 PHOTOGRAPH... FOLDER      FOLDER gets a .ppm of the same name for each
"""

import json
import sys
from pathlib import Path

from PIL import Image
from timm.data.transforms_factory import create_transform

from tokenprune_ext.export import load_program

package, *photographs, folder = sys.argv[1:]
details = load_program(package).details
transform = create_transform(
    json.loads(details["input_size"]),
    interpolation=details["interpolation"],
    crop_pct=json.loads(details["crop_pct"]),
    crop_mode=details["crop_mode"],
    normalize=False,  # left as bytes
)
Path(folder).mkdir(exist_ok=True)
for photograph in photographs:
    pixels = transform(Image.open(photograph).convert("RGB"))
    target = Path(folder) / Path(photograph).with_suffix(".ppm").name
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(target)
    print(target)
