"""The executor must catch what it claims to catch, and let sound kernels pass."""

import ctypes

import pytest
import torch

from tests.backends.simt import build


def run(name: str, *, reverse: bool = False, flags: tuple[str, ...] = ()) -> tuple[str, torch.Tensor]:
    """The message of the fault ("" if none) and the output of one kernel of planted_faults.cpp."""
    library = ctypes.CDLL(str(build.build(build.SIMT / "planted_faults.cpp", flags=flags)))
    given, out = torch.arange(64, dtype=torch.float32), torch.zeros(64)
    library.simt_reset(int(reverse), 2)
    for tensor, output, label in ((given, 0, b"input"), (out, 1, b"output")):
        library.simt_guard(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(256), output, 1 - output, label)
    message = ctypes.create_string_buffer(1000)
    addresses = (ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    code = library.run_case(name.encode(), *addresses, message, 1000)
    assert (code != 0) == bool(message.value)
    return message.value.decode(), out


LANES = torch.arange(32, dtype=torch.int32)
SOUND = {
    "sum": lambda out: out[0] == 63 * 32,
    "write after read": lambda out: out.equal((torch.arange(64.0) + 1) % 64),
    "warp exchange": lambda out: out[:32].equal((LANES ^ 1).float()),
    "copy": lambda out: out.equal(torch.arange(64.0)),
    "shared": lambda out: (out == 1).all(),
    "shuffle": lambda out: out.view(torch.int32)[:32].equal(LANES ^ 5),
    "shuffle in half a warp": lambda out: out.view(torch.int32)[:16].equal(LANES[:16] ^ 5),
    "async copy": lambda out: out[:16].equal((LANES[:16] ^ 1).float() * 4),
    "blocks": lambda out: out[:2].tolist() == [1, 1],
    "atomic count": lambda out: out.view(torch.int32)[0] == 64,
}
FAULTS = {
    "sum without barrier": "race on shared memory",
    "write after read without barrier": "race on shared memory",
    "warp exchange without sync": "race on shared memory",
    "read past the end": "out-of-bounds read of input at byte 256 of 256",
    "read before the start": "out-of-bounds read of input",
    "write past the end": "out-of-bounds write of output",
    "write to an input": "write to read-only input",
    "shared past the end": "out-of-bounds write of shared memory",
    "half a barrier": "divergent barrier",
    "two barriers": "divergent barrier",
    "barrier against shuffle": "divergent barrier",
    "mask without the caller": "not in its own mask",
    "mask with exited lanes": "which has exited|16 exited",
    "source outside the mask": "reads a lane outside the mask",
    "two masks": "with another mask",
    "async copy without wait": "before the wait for its cp.async",
    "async copy with one group left": "before the wait for its cp.async",
    "async copy without barrier": "race on shared memory|before the wait|nobody wrote",
    "unwritten shared memory": "that nobody wrote",
    "unwritten output": "that nobody wrote",
    "misaligned": "misaligned read",
    "atomic after its own thread's store": "race on shared memory|nobody wrote",
    "atomic after its own thread's read": "race on shared memory",
    "store after atomics": "race on shared memory",
    "blocks at one address": "write-after-write race on output",
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SOUND)
def test_sound_kernels_pass(name, reverse):
    message, out = run(name, reverse=reverse)
    assert message == ""
    assert SOUND[name](out)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, reverse):
    message, _ = run(name, reverse=reverse)
    assert any(part in message for part in FAULTS[name].split("|")), message


def test_portable_fibers():
    """The ucontext fibers of other machines run the same kernels."""
    flags = ("-DSAFERCLIP_SIMT_UCONTEXT",)
    assert run("sum", flags=flags)[1][0] == 63 * 32
    assert "divergent barrier" in run("half a barrier", flags=flags)[0]
