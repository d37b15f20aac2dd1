"""Choose how far to go: figures along the safety dial, a bound on what is lost, the model at that place."""

from pathlib import Path

import saferclip_fast as sf
from saferclip_fast.data import open_quadruplets

# yours: a folder of images for each class, food101/test; these are drawn, and their classes by chance
for i, record in enumerate(open_quadruplets("scenes:n=80,size=32,split=test").records):
    folder = Path("classes", ("cat", "ship")[i % 2])
    folder.mkdir(parents=True, exist_ok=True)
    record.safe_image.load().save(folder / f"{i}.png")

tuned = sf.fine_tune(
    "ViT-tiny-8-32",  # yours: "ViT-L-14-quickgelu,openai"
    "scenes:n=64,size=32",
    options={"train.epochs": 2, "train.batch_size": 16, "data.num_workers": 0},
    run_dir="runs/dial",
)
found = sf.evaluate(
    tuned,
    "scenes:n=32,size=32,split=test",  # yours: held-out quadruplets
    images={"classes": "classes"},
    dial=True,
    max_loss=0.02,  # at most 2 points of accuracy, with a confidence of 95 %
    samples=200,
)
for point in found.dial:
    unsafe, useful = (point.metrics[name].value for name in ("unsafe_rate@10", "zero_shot"))
    print(f"dial {point.alpha:4}: unsafe among the first 10 {unsafe:.2f}, zero-shot accuracy {useful:.2f}")
assert found.promise is not None
print(found.promise)  # of accuracy alone: read the unsafe rate at that dial, above, before you use it
model = sf.load(tuned, dial=found.promise.alpha)  # 0 where nothing can be promised: more images tell more
print(f"{model.name} at {found.promise.alpha}, weights {model.weights_hash[:12]}")
