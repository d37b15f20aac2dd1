"""The losses alone, in a training loop of your own: any two encoders, any optimizer, no part of the trainer.

    python examples/ops_in_your_loop.py

Two small linear "encoders" stand for yours. What matters is the order: frozen embeddings and the bank once, then in
each step four embeddings, two calls, one backward.
"""

import torch
from torch import nn

import saferclip_fast as sf

torch.manual_seed(0)
WIDTH, SAMPLES, BATCH = 64, 512, 64

text_encoder, image_encoder = nn.Linear(32, WIDTH), nn.Linear(48, WIDTH)
safe_text, safe_image = torch.randn(SAMPLES, 32), torch.randn(SAMPLES, 48)
unsafe_text = safe_text + 3 * torch.randn(32)  # the same contents, all with the same hazard
unsafe_image = safe_image + 3 * torch.randn(48)

with torch.no_grad():  # once: what the model says before training, and the safe pairs to redirect to
    frozen = {
        "safe_text": text_encoder(safe_text),
        "safe_image": image_encoder(safe_image),
        "unsafe_text": text_encoder(unsafe_text),
        "unsafe_image": image_encoder(unsafe_image),
    }
bank = sf.SafeBank(frozen["safe_text"], frozen["safe_image"]).pack()
neighbors = sf.nearest_safe(frozen["unsafe_text"], bank)  # the search once, too; leave it out to search in the step

optimizer = torch.optim.Adam([*text_encoder.parameters(), *image_encoder.parameters()], lr=1e-3)
distances = []
for _ in range(100):
    rows = torch.randint(SAMPLES, (BATCH,))
    redirect = sf.retarget_loss(
        text_encoder(unsafe_text[rows]),
        image_encoder(unsafe_image[rows]),
        frozen["unsafe_text"][rows],
        frozen["unsafe_image"][rows],
        bank,
        neighbors=sf.Neighbors(neighbors.scores[rows], neighbors.indices[rows]),
    )
    keep = sf.preservation_loss(
        text_encoder(safe_text[rows]),
        image_encoder(safe_image[rows]),
        frozen["safe_text"][rows],
        frozen["safe_image"][rows],
    )
    optimizer.zero_grad()
    (redirect.loss + keep.loss).backward()
    optimizer.step()
    distances.append(float(redirect.terms["uni_text"]))  # mean of 1 - cos(unsafe text, its safe target)

print(f"distance of unsafe texts to their safe targets: {distances[0]:.3f} -> {distances[-1]:.3f}")
assert distances[-1] < distances[0]
