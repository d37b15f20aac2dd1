"""An objective of your own in the library's training loop: caches, curriculum, checkpoints and export stay as they are.

    python examples/custom_objective.py

An objective gets the four embeddings of a batch as the model gives them, the same from the frozen model, and the bank;
it gives a loss and named terms, which the log shows. This one pulls both unsafe modalities to the same target, the mean
of the nearest safe caption and its image, which keeps redirected pairs together. (Not a recommendation.)
"""

import warnings

import torch.nn.functional as F
from torch import Tensor

from saferclip_fast import Neighbors, SafeBank, nearest_safe
from saferclip_fast.config import load_config
from saferclip_fast.data import QuadrupletEmbeddings
from saferclip_fast.models import load_clip
from saferclip_fast.objectives import Objective, ObjectiveOutput
from saferclip_fast.objectives.common import cosine_distance, label_mask
from saferclip_fast.runtime.ranks import ALONE, Share
from saferclip_fast.train import Trainer
from saferclip_fast.train.prepare import prepare


class PullToThePair(Objective):
    """loss = d(T(t*), m) + d(V(v*), m) + 4 d(T(t), T0(t)) + 4 d(V(v), V0(v)), d = 1 - cos, m the safe pair's mean."""

    SHOWN = ("pull_text", "pull_image")

    def forward(
        self,
        current: QuadrupletEmbeddings,
        frozen: QuadrupletEmbeddings,
        bank: SafeBank,
        neighbors: Neighbors | None = None,
        text_is_unsafe: Tensor | None = None,
        image_is_unsafe: Tensor | None = None,
        share: Share = ALONE,
    ) -> ObjectiveOutput:
        if neighbors is None:  # objective.neighbors=in_step
            neighbors = nearest_safe(frozen.unsafe_text, bank)
        rows = neighbors.indices[:, 0]
        target = F.normalize(bank.text[rows] + bank.image[rows], dim=-1)
        of_text = label_mask("text_is_unsafe", text_is_unsafe, target)  # 1 for rows that are unsafe
        of_image = label_mask("image_is_unsafe", image_is_unsafe, target)
        every = label_mask("safe", None, target)
        terms = {
            "pull_text": cosine_distance(current.unsafe_text, target, of_text, share),
            "pull_image": cosine_distance(current.unsafe_image, target, of_image, share),
            "cos_text": cosine_distance(current.safe_text, frozen.safe_text, every, share),
            "cos_image": cosine_distance(current.safe_image, frozen.safe_image, every, share),
        }
        loss = terms["pull_text"] + terms["pull_image"] + 4 * (terms["cos_text"] + terms["cos_image"])
        return ObjectiveOutput(loss, {name: term.detach() for name, term in terms.items()}, neighbors)


words = """
    run_dir=my_run data.train=scenes:n=200,size=32 data.val_fraction=0.2 data.cache_dir=my_cache data.num_workers=0
    model.name=ViT-tiny-8-32 model.pretrained= lora.rank=4 optimizer.lr=3e-3
    train.epochs=4 train.batch_size=16 train.precision=fp32 log.progress=false
"""
config = load_config(None, words.split())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a toy with random weights; model.pretrained names real ones
    clip = load_clip(config.model.name, config.model.pretrained)
data = prepare(config, clip)  # frozen embeddings and nearest safe texts, cached
clip.add_lora(config.lora.rank, config.lora.alpha)

trainer = Trainer(config, clip, data)
trainer.objective = PullToThePair()
assert data.val is not None  # data.val_fraction held some out
before = trainer.validate(data.val)
result = trainer.fit()
after = trainer.validate(data.val)

for name in ("loss", "pull_text", "pull_image", "cos_text", "cos_image"):
    print(f"{name:12}{before[name]:.3f} -> {after[name]:.3f}")
print(f"weights for open_clip: {result.weights}")
assert after["loss"] < before["loss"]
