"""A bank of your own: which safe pair is nearest to a text, from embeddings of any source.

    python examples/custom_bank.py

A bank is two aligned matrices: row i of both is one safe pair. Here they come from a small CLIP with random weights and
drawn scenes; yours come from files, a database, another model. The bank is redirected to only if it was made by the
model that is trained, so what made it goes into its metadata and is checked when it is loaded.
"""

import torch

import saferclip_fast as sf
from saferclip_fast import data
from saferclip_fast.models import load_clip

torch.manual_seed(0)
clip = load_clip("ViT-tiny-8-32")
scenes = data.open_quadruplets("scenes:n=200,seed=0", transform=clip.preprocess)

with torch.no_grad():
    text = clip.encode_text(clip.tokenizer(scenes.safe_texts))
    image = torch.cat([clip.encode_image(scenes[i]["safe_image"][None]) for i in range(len(scenes))])
    query = clip.encode_text(clip.tokenizer(scenes.unsafe_texts[:3]))

bank = sf.SafeBank(text, image, {"weights_hash": clip.weights_hash}).pack()
bank.save("my_bank.safetensors")
bank = sf.SafeBank.load("my_bank.safetensors", expect={"weights_hash": clip.weights_hash})
print(bank)

found = sf.nearest_safe(query, bank, k=2)
for caption, scores, rows in zip(scenes.unsafe_texts, found.scores, found.indices, strict=False):
    print(f"\n{caption}")
    for score, row in zip(scores, rows, strict=True):
        print(f"  {score:.3f}  {scenes.safe_texts[row]}")

# a part of the bank, for example the share of one process of four
part = bank.shard(rank=1, world=4)
print(f"\nrows {part.offset} to {part.offset + len(part)}: best {sf.nearest_safe(query, part).scores[:, 0].tolist()}")
