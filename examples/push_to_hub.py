"""Export a run for transformers and send it, with its model card, to the Hugging Face hub."""

from pathlib import Path

import saferclip_fast as sf

REPOSITORY = None  # yours: "me/clip-safe", after `hf auth login`; None writes the folder and sends nothing

tuned = sf.fine_tune(
    "ViT-tiny-8-32",  # yours: "ViT-L-14-quickgelu,openai"
    "scenes:n=48,size=32",
    options={"train.epochs": 1, "train.batch_size": 16, "data.val_fraction": 0.2, "data.num_workers": 0},
    run_dir="runs/hub",
)
sf.evaluate(tuned, out=tuned.run_dir, samples=200)  # the model card shows these figures
exported = sf.export(tuned, "exports/hub", "huggingface", push_to_hub=REPOSITORY, private=True)["huggingface"]
for file in sorted(Path(exported.folder).rglob("*")):
    print(file)
