"""Label generated images by a classifier: those that turned out safe are kept in place, not redirected."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from saferclip_fast.data import open_quadruplets
from saferclip_fast.label_images import label_table

Path("pictures").mkdir()
with Path("pairs.jsonl").open("w") as table:  # yours: any table with the column unsafe_image
    for i, record in enumerate(open_quadruplets("scenes:n=12,size=32,mixed=0.5").records):
        row = {"safe_text": record.safe_text, "unsafe_text": record.unsafe_text}
        for name in ("safe_image", "unsafe_image"):
            row[name] = f"pictures/{name}{i}.png"
            getattr(record, name).load().save(row[name])
        print(json.dumps(row), file=table)


def probably_unsafe(images: Sequence[Image]) -> list[float]:
    """The probability that each image is unsafe. Yours: a real classifier; this toy looks at how bright they are."""
    return [image.convert("L").resize((1, 1)).tobytes()[0] / 255 for image in images]


counts = label_table("pairs.jsonl", "labeled.jsonl", probably_unsafe, threshold=0.5)
print(f"{counts.unsafe} unsafe, {counts.safe} safe after all")
labeled = open_quadruplets("labeled.jsonl")  # training and evaluation take the labels from here
assert sum(record.unsafe_image_label for record in labeled.records) == counts.unsafe
