"""The ops are called from many Python threads at once, and each caller gets the bits that it would get alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import saferclip_fast as sf

CALLERS, CALLS = 6, 8


def job(seed: int) -> list[torch.Tensor]:
    """Every op, forward and backward, on inputs of its own."""
    generator = torch.Generator().manual_seed(seed)
    d = 24 + 8 * (seed % 3)
    bank = sf.SafeBank(*torch.randn(2, 300 + seed, d, generator=generator))
    text, image, frozen_text, frozen_image = torch.randn(4, 33, d, generator=generator).unbind()
    text.requires_grad_()
    image.requires_grad_()
    found = sf.nearest_safe(frozen_text, bank.pack() if seed % 2 else bank, k=3)
    redirect = sf.retarget_loss(text, image, frozen_text, frozen_image, bank, k=2)
    keep = sf.preservation_loss(text, image, frozen_text, frozen_image)
    (redirect.loss + keep.loss).backward()
    return [found.scores, found.indices, redirect.loss.detach(), keep.loss.detach(), text.grad, image.grad]


def test_many_callers_at_once():
    alone = [job(seed) for seed in range(CALLERS)]
    with ThreadPoolExecutor(CALLERS) as pool:
        together = list(pool.map(job, list(range(CALLERS)) * CALLS))
    for number, found in enumerate(together):
        for mine, expected in zip(found, alone[number % CALLERS], strict=True):
            assert torch.equal(mine, expected)


def test_callers_share_one_bank_while_it_is_packed():
    text = torch.nn.functional.normalize(torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)))
    expected = sf.nearest_safe(text[:50], text, k=5)
    for _ in range(5):
        bank = sf.SafeBank(text, text)
        with ThreadPoolExecutor(CALLERS) as pool:
            calls = [pool.submit(lambda b: sf.nearest_safe(text[:50], b.pack(), k=5), bank) for _ in range(2 * CALLERS)]
            found = [call.result() for call in calls]
        assert all(torch.equal(f.indices, expected.indices) for f in found)


def test_a_bank_can_be_searched_as_soon_as_its_packed_copy_is_seen():
    class Seen(sf.SafeBank):
        """Another thread's search at the worst moment."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "packed" and value is not None:
                found.append(sf.nearest_safe(self.text[:1], self, k=1))

    found = []
    Seen(*torch.randn(2, 20, 8)).pack()
    assert len(found) == 1 and found[0].indices.item() == 0


FORK = """
import os, torch, saferclip_fast as sf
torch.set_num_threads(2)
query, bank = torch.randn(512, 64), torch.nn.functional.normalize(torch.randn(5000, 64), dim=1)
expected = sf.nearest_safe(query, bank, k=3)
child = os.fork()
if child == 0:
    found = sf.nearest_safe(query, bank, k=3)
    sf.nearest_safe(query, bank, k=3)
    products = torch.randn(500, 500) @ torch.randn(500, 500)
    os._exit(0 if torch.equal(found.indices, expected.indices) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_goes_on_with_one_thread():
    """It waited forever for threads that a child does not have."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was forked after ops had used threads, and goes on with one") == 1


def test_a_loaders_workers_say_nothing_of_their_one_thread():
    """They call no op; a run that validates would fill its output with warnings."""
    text = f"{FORK.split('child =')[0]}\nlist(torch.utils.data.DataLoader([1, 2], num_workers=2))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "forked" not in done.stderr, done.stderr
