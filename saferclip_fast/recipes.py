"""The settings that a method comes with: the paper's, and those of each baseline's authors."""

from typing import Any

# Defaults that a choice brings with it: (option, value) -> other options. The file and the words go over them.
RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("objective.preset", "paper"): {
        "objective.neighbors": "offline",
        "objective.k": 1,
        "objective.beta": 1.0,
        "objective.margin": 0.0,
        "objective.negative": "frozen",
        # ours, since the paper's are not known: with a frozen negative, cross terms above the uni-modal ones drive the
        # encoders past the safe region
        "objective.weights.uni_text": 4.0,
        "objective.weights.uni_image": 4.0,
        "objective.weights.cross_text": 1.0,
        "objective.weights.cross_image": 1.0,
        "objective.weights.cos_text": 1.0,
        "objective.weights.cos_image": 1.0,
        "objective.weights.nce_text": 0.2,
        "objective.weights.nce_image": 0.2,
        "objective.weights.rank_guard": 0.0,
        "curriculum.enabled": True,
    },
    # the baselines' recipes, of the authors' script and of the paper; neither has a curriculum
    ("objective.name", "safeclip"): {
        "curriculum.enabled": False,
        "lora.alpha": 1.0,
        "lora.dropout": 0.1,
        "optimizer.lr": 1e-3,
        "train.batch_size": 128,
        "validation.metric": "recall_sum",
        "validation.patience": 5,
    },
    ("objective.name", "shieldclip"): {
        "curriculum.enabled": False,
        "optimizer.lr": 1e-4,
        "train.batch_size": 128,
        "validation.metric": "recall_sum",
        "validation.patience": 5,
    },
}
