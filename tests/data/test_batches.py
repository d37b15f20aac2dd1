"""Batches: stacked, labeled, and captions trimmed to the longest without changing their embedding."""

import open_clip
import pytest
import torch
from torch.utils.data import DataLoader

from saferclip_fast.data import SceneDataset, collate
from saferclip_fast.data.captions import pad_id, trim

TEXTS = ["a red star", "a small blue striped circle on fire in the desert", "a moon"]


@pytest.fixture(scope="module")
def tokenizer() -> open_clip.tokenizer.SimpleTokenizer:
    return open_clip.get_tokenizer("ViT-B-32")


def test_batch_contents(tokenizer: open_clip.tokenizer.SimpleTokenizer) -> None:
    data = SceneDataset(n=7, mixed=0.5)
    batches = list(DataLoader(data, batch_size=4, collate_fn=collate(tokenizer)))
    assert [len(batch["index"]) for batch in batches] == [4, 3]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(7))
    for batch in batches:
        count = len(batch["index"])
        for side in ("safe", "unsafe"):
            assert batch[f"{side}_image"].shape == (count, 3, 32, 32)
            texts = [data[int(i)][f"{side}_text"] for i in batch["index"]]
            full = tokenizer(texts)
            tokens = batch[f"{side}_tokens"]
            assert tokens.dtype == torch.int64 and (tokens[:, -1] != 0).any()  # no column of padding alone
            assert torch.equal(full[:, : tokens.shape[1]], tokens) and (full[:, tokens.shape[1] :] == 0).all()
        for name in ("unsafe_text_label", "unsafe_image_label"):
            assert batch[name].tolist() == [data[int(i)][name] for i in batch["index"]]


def test_a_long_caption_is_cut_at_the_context(tokenizer: open_clip.tokenizer.SimpleTokenizer) -> None:
    batch = collate(tokenizer).tokens(["red " * 200, "a star"])
    assert batch.shape == (2, 77)
    assert batch[0, -1] == batch.max()  # the end-of-text token survives


def test_trimming_can_be_switched_off(tokenizer: open_clip.tokenizer.SimpleTokenizer) -> None:
    assert collate(tokenizer, trim=False).tokens(TEXTS).shape == (3, 77)


def test_padding_inside_a_caption_stays() -> None:
    tokens = torch.tensor([[5, 0, 6, 0, 0], [5, 6, 0, 0, 0]])
    assert trim(tokens).tolist() == [[5, 0, 6], [5, 6, 0]]
    assert trim(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 1)
    assert trim(torch.tensor([[0, 2, 1, 1]]), pad=1).tolist() == [[0, 2]]


def test_pad_id_of_wrapped_tokenizers() -> None:
    class Inner:
        pad_token_id = 1

    class Wrapped:
        tokenizer = Inner()

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[0, 7, 2, 1, 1]] * len(texts))

    assert pad_id(Wrapped()) == 1
    assert collate(Wrapped()).tokens(["x"]).tolist() == [[0, 7, 2]]


def test_a_causal_text_tower_gives_the_same_embedding_for_trimmed_tokens(
    tokenizer: open_clip.tokenizer.SimpleTokenizer,
) -> None:
    """open_clip towers want exactly their context, so the short twin is built with the trimmed one."""

    def tower(context: int) -> open_clip.CLIP:
        text = {"context_length": context, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
        return open_clip.CLIP(16, vision, text).eval()

    padded = tokenizer(TEXTS)
    trimmed = trim(padded)
    assert trimmed.shape[1] < 20
    torch.manual_seed(0)
    full, short = tower(77), tower(trimmed.shape[1])
    state = full.state_dict()
    state["positional_embedding"] = state["positional_embedding"][: trimmed.shape[1]]
    short.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(short.encode_text(trimmed), full.encode_text(padded), atol=1e-5, rtol=1e-5)
