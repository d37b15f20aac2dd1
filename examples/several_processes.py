"""Training from Python on several GPUs or cores: torchrun starts this script once for each.

    torchrun --nproc-per-node=2 examples/several_processes.py

By itself it is one process. The gradient is that of the whole batch, whatever their number.
"""

from saferclip_fast.config import load_config
from saferclip_fast.train import train

if __name__ == "__main__":  # loader processes import this file again
    config = load_config(
        None,
        {
            "run_dir": "runs/several",
            "model": {"name": "ViT-tiny-8-32", "pretrained": ""},  # yours: ViT-L-14-quickgelu, openai
            "data": {"train": "scenes:n=64,size=32", "val_fraction": 0.2, "num_workers": 0},
            "train": {"epochs": 2, "batch_size": 16, "precision": "fp32"},  # the batch of all processes together
        },
    )
    result = train(config)
    print(f"step {result.progress.step}, weights in {result.weights}")  # the first process writes them
