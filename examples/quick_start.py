"""A data frame in; a safe model out, measured, exported, and loaded by transformers. Needs pandas and transformers."""

import pandas as pd
from transformers import CLIPModel

import saferclip_fast as sf
from saferclip_fast.data import open_quadruplets

# Yours: pd.read_csv("pairs.csv"), with paths of images, and "ViT-L-14-quickgelu,openai". These are drawn and tiny.
frame = pd.DataFrame([vars(record) for record in open_quadruplets("scenes:n=64,size=32").records])
tuned = sf.fine_tune(
    "ViT-tiny-8-32", frame, options={"train.epochs": 3, "data.val_fraction": 0.2}, run_dir="runs/quick"
)
print(sf.evaluate(tuned))
exported = sf.export(tuned, "exports/quick", "huggingface")["huggingface"]
model = CLIPModel.from_pretrained(exported.folder)
print(f"{type(model).__name__} in {exported.folder}, embeddings differ by at most {exported.difference:.0e}")
