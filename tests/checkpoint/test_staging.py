from __future__ import annotations

import random
import threading

import pytest
import torch

from paceline.checkpoint.staging import Ring, StagedTensors, Staging, aligned
from paceline.core.errors import PacelineError

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(30))
def test_a_ring_gives_no_room_twice(seed):
    generator = random.Random(seed)
    size = generator.randrange(10, 200)
    ring, given = Ring(size), []
    for _ in range(500):
        wanted = generator.randrange(1, size + 1)
        begin = ring.reserve(wanted)
        if begin is None:
            assert given, "an empty ring has room for whatever is not larger"
            ring.release()
            given.pop(0)
            continue
        assert 0 <= begin <= size - wanted
        assert all(begin + wanted <= b or e <= begin for b, e in given)
        given.append((begin, begin + wanted))
        assert ring.used_bytes == sum(e - b for b, e in given) <= size


def test_a_ring_has_no_room_for_more_than_it_is():
    assert Ring(10).reserve(11) is None


def tensors() -> list[torch.Tensor]:
    """Of several dtypes, a scalar and a view that is not contiguous among them."""
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(40, 30, generator=generator)
    return [
        wide,
        wide[:, 3:17],
        torch.tensor(3.5),
        wide.bfloat16().t(),
        wide.double(),
        torch.arange(7, dtype=torch.int8),
        torch.tensor([True, False]),
    ]


@pytest.mark.parametrize("spare_bytes", [0, 64, 10_000])
def test_what_is_taken_is_what_was_there(spare_bytes):
    live = tensors()
    expected = [tensor.clone() for tensor in live]
    largest = max(aligned(tensor.nbytes) for tensor in live)
    staging = Staging([t.nbytes for t in live], largest + spare_bytes, CPU)
    for _ in range(3):  # the buffer is used again
        staged = StagedTensors(staging, live)
        thread = threading.Thread(target=staged.stage)
        thread.start()
        for wanted in expected:
            copy = staged.take()
            assert torch.equal(copy, wanted)
            assert (copy.dtype, copy.shape) == (wanted.dtype, wanted.shape)
            # Torch clones, as it writes, whatever is a view of more.
            assert copy.untyped_storage().size() == copy.nbytes
        thread.join()
        assert staged.staged.is_set()
        assert largest <= staged.peak_bytes <= staging.size_bytes


def test_a_buffer_is_no_larger_than_what_is_saved():
    assert Staging([100, 28], 0, CPU).size_bytes == 192
    assert Staging([100, 28], 1 << 40, CPU).size_bytes == 192
    assert Staging([], 0, CPU).size_bytes == 0


def test_a_tensor_that_is_larger_than_the_buffer_is_refused():
    with pytest.raises(PacelineError, match=r"buffer_bytes = 128: .* needs 1024") as caught:
        Staging([64, 1000], 128, CPU)
    assert "use 1024 or more" in caught.value.hint


def test_nobody_waits_for_one_that_has_failed():
    live = [torch.zeros(100), torch.zeros(100)]
    staged = StagedTensors(Staging([400, 400], 448, CPU), live)
    thread = threading.Thread(target=staged.stage)
    thread.start()
    staged.take()
    staged.abandon(OSError("no space"))
    thread.join(10)
    assert not thread.is_alive()
    assert staged.staged.is_set()
    with pytest.raises(OSError, match="no space"):
        staged.take()
