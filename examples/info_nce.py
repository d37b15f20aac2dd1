"""InfoNCE alone, in a contrastive training loop of your own: any two encoders, large batches in little memory."""

import torch
from torch import nn

import saferclip_fast as sf

torch.manual_seed(0)
text, image = torch.randn(512, 32), torch.randn(512, 48)
image[:, :32] += 2 * text  # what belongs together has something in common
text_encoder, image_encoder = nn.Linear(32, 64), nn.Linear(48, 64)
optimizer = torch.optim.Adam([*text_encoder.parameters(), *image_encoder.parameters()], lr=1e-3)

losses = []
for _ in range(60):
    rows = torch.randint(512, (128,))
    # the mean of both directions; row i of one belongs to row i of the other, the rest are negatives
    loss = sf.info_nce(text_encoder(text[rows]), image_encoder(image[rows]), logit_scale=20.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"InfoNCE {losses[0]:.3f} -> {losses[-1]:.3f}")
assert losses[-1] < losses[0]
