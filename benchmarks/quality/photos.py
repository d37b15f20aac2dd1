"""The demo's job on real photographs: python -m benchmarks.quality.photos --photos FILE.tar

The tar holds train/CLASS/NAME and test/CLASS/NAME images (CIFAR-10, say) and is read where it lies. The unsafe version
of a photograph has a hazard sign composited in, named in its caption. Writes evaluation.json and a figure to --run-dir.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from saferclip_fast.data.labeled import of_photos
from saferclip_fast.data.synthetic.photos import PhotoDataset, pretrain_photos
from saferclip_fast.demo.__main__ import arguments, launch
from saferclip_fast.demo.job import Job

PRETRAIN_PAIRS, PRETRAIN_EPOCHS = 30_000, 4
QUADRUPLETS, HELD_OUT = 3_000, 2_000


def photos_job(photos: Path, seed: int, samples: int | None = None) -> Job:
    held_out = PhotoDataset(str(photos), "test", samples or HELD_OUT, seed, mismatch=0.0)
    return Job(
        name=f"photos{PRETRAIN_PAIRS}",
        config="demo",
        pairs=lambda: pretrain_photos(photos, PRETRAIN_PAIRS, seed),
        pretrain_epochs=PRETRAIN_EPOCHS,
        source=f"photos:path={photos},n={QUADRUPLETS},seed={seed}",
        held_out=held_out,
        right_labels=torch.from_numpy(held_out.unsafe_labels),
        zero_shot=of_photos(held_out),
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments("Fine-tune and evaluate on photographs, before and after.", "runs/photos")
    parser.add_argument("--photos", type=Path, help="tar with train/CLASS/NAME and test/CLASS/NAME images")
    given = parser.parse_intermixed_args(words)
    if given.photos is None or not given.photos.is_file():
        parser.error(
            f"pass --photos FILE.tar, a tar of photographs in train/CLASS/ and test/CLASS/ folders (got {given.photos})"
        )
    return launch(lambda: photos_job(given.photos, given.seed), given)


if __name__ == "__main__":
    sys.exit(main())
