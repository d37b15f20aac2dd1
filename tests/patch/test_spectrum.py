"""The energy of a gradient by rank."""

import pytest
import torch

import saferclip_fast as sf
from saferclip_fast.models.lora import adaptable_layers
from saferclip_fast.patch.spectrum import RANKS, Spectrum, _energy, of_all, spectra


def test_energy_is_the_share_of_squared_singular_values():
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(90, 40, generator=generator, dtype=torch.float64))
    s = torch.linspace(4, 0.1, 40, dtype=torch.float64)
    wanted = [float((s[:rank] ** 2).sum() / (s**2).sum()) for rank in RANKS]
    for gradient in (u * s @ v.T, (u * s @ v.T).T, (u * s @ v.T).reshape(40, 10, 3, 3)):
        assert _energy(gradient) == pytest.approx(wanted, abs=1e-9)
    assert _energy(torch.outer(u[0], v[0]))[0] == pytest.approx(1.0)
    assert _energy(torch.zeros(4, 5)) == (1.0,) * len(RANKS)


def test_weights_count_by_their_gradients_squares():
    one, flat = (1.0,) * len(RANKS), (0.5,) * len(RANKS)
    whole = of_all([Spectrum("a", 3.0, one), Spectrum("b", 4.0, flat)])
    assert whole == pytest.approx(((9 + 16 * 0.5) / 25,) * len(RANKS))
    assert of_all([Spectrum("a", 0.0, one)]) == one


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    clip = sf.load_clip("ViT-tiny-8-32")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = spectra(clip, lambda: clip.encode_image(images).square().sum())
    assert {layer.name for layer in found} == {
        f"{name}.weight" for name in adaptable_layers(clip.model) if name.startswith("visual.")
    }, "weights that took no part have no gradient"
    assert all(layer.norm > 0 for layer in found)
    assert not any(p.requires_grad or p.grad is not None for p in clip.model.parameters())
