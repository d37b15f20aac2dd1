"""Watch a run and end it early: callbacks of fine_tune, and the weights of the best validation."""

import saferclip_fast as sf
from saferclip_fast.train import StepInfo, StopTraining, ValidationInfo

losses: list[float] = []


def on_step(info: StepInfo) -> None:
    if "loss" in info.metrics:  # every log.every_steps steps: reading it makes a GPU wait
        print(f"step {info.step} of {info.steps}: loss {info.metrics['loss']:.3f}")


def on_validation(info: ValidationInfo) -> None:
    losses.append(info.metrics["loss"])
    print(f"validation {len(losses)}: loss {losses[-1]:.3f}{', the best' if info.best else ''}")
    if len(losses) >= 3:  # yours: a budget, a target, a button
        raise StopTraining


tuned = sf.fine_tune(
    "ViT-tiny-8-32",  # yours: "ViT-L-14-quickgelu,openai"
    "scenes:n=64,size=32",
    options={"train.epochs": 20, "train.batch_size": 16, "data.val_fraction": 0.2, "log.every_steps": 2},
    run_dir="runs/watched",
    on_step=on_step,
    on_validation=on_validation,
)
print(f"ended after {len(losses)} validations; weights in {tuned.run_dir}")
assert len(losses) == 3
