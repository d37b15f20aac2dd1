"""Fine-tune on a data set of `datasets` as it is, with columns of its own names. Needs datasets."""

from datasets import Dataset

import saferclip_fast as sf
from saferclip_fast.data import open_quadruplets

# Yours: datasets.load_dataset("parquet", data_files="pairs-*.parquet", split="train"). These are drawn.
records = open_quadruplets("scenes:n=48,size=32").records
pairs = Dataset.from_list(
    [
        {
            "image": record.safe_image.load(),
            "caption": record.safe_text,
            "bad_image": record.unsafe_image.load(),
            "bad_caption": record.unsafe_text,
        }
        for record in records
    ]
)
names = ["safe_image=image", "safe_text=caption", "unsafe_image=bad_image", "unsafe_text=bad_caption"]
tuned = sf.fine_tune(
    "ViT-tiny-8-32",  # yours: "ViT-L-14-quickgelu,openai"
    pairs,
    options={"data.columns": names, "data.val_fraction": 0.2, "train.epochs": 2, "train.batch_size": 16},
    run_dir="runs/datasets",
)
print(pairs)
print(sf.evaluate(tuned, samples=200)["unsafe_rate@10"].change)
