"""`serve.batch_invariant`: the bits of a row of logits do not depend on the rest of the pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paceline.core.errors import ConfigError
from paceline.decode.paged import Next, PagedStore, extend_all
from paceline.kernels import native
from paceline.models.families import family
from paceline.models.fuse import fuse
from paceline.models.int8 import use_int8
from paceline.models.invariant import make_invariant
from paceline.models.weights import RandomWeights, build, fill
from paceline.plan.plan import Plan
from paceline.serve.load import load_engine

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
BLOCK = 16
LENGTHS = (1, 3, 17, 40, 90)


def invariant_model(name="llama", dtype=torch.float32, int8=False):
    spec = replace(family(name).PRESETS["tiny"], initializer_std=0.15)
    model = build(spec, dtype)
    fill(model, RandomWeights(spec), CPU)
    fuse(model)
    if int8:
        use_int8(model)
    make_invariant(model)
    return model.eval()


class Passes:
    """Sequences whose last logits are computed in passes of any cut."""

    def __init__(self, model):
        self.model = model
        generator = torch.Generator().manual_seed(2)
        self.tokens = [torch.randint(0, 259, (n,), generator=generator).tolist() for n in LENGTHS]
        counts = [-(-n // BLOCK) for n in LENGTHS]
        self.tables = list(torch.arange(sum(counts), dtype=torch.int32).split(counts))
        self.num_blocks = sum(counts)

    def store(self):
        dtype = self.model.embedding.weight.dtype
        return PagedStore(self.model.spec, self.num_blocks, BLOCK, dtype, CPU)

    def run(self, which, chunk=None):
        """Logits of every token of some sequences, computed `chunk` tokens of each at a time."""
        store = self.store()
        parts = {index: [] for index in which}
        for start in range(0, max(LENGTHS), chunk or max(LENGTHS)):
            now = [i for i in which if start < LENGTHS[i]]
            cut = [self.tokens[i][start:][: chunk or max(LENGTHS)] for i in now]
            step = [Next(t, start, self.tables[i]) for i, t in zip(now, cut, strict=True)]
            wanted = range(sum(map(len, cut)))
            rows = extend_all(self.model, step, store, wanted).split([len(t) for t in cut])
            for index, of_one in zip(now, rows, strict=True):
                parts[index].append(of_one)
        return [torch.cat(parts[index]) for index in which]


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype", "int8"),
    [
        ("llama", torch.float32, False),
        ("llama", torch.bfloat16, False),
        ("gemma3", torch.float32, False),
        ("llama", torch.float32, True),
        ("llama", torch.bfloat16, True),
    ],
    ids=str,
)
def test_alone_among_others_and_in_chunks(name, dtype, int8, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        passes = Passes(invariant_model(name, dtype, int8))
        together = passes.run(range(len(LENGTHS)))
        for index in range(len(LENGTHS)):
            assert torch.equal(passes.run([index])[0], together[index])
        for chunk in (1, 7, 33):
            chunked = passes.run(range(len(LENGTHS)), chunk)
            assert all(map(torch.equal, chunked, together))
    finally:
        torch.set_num_threads(before)


def test_the_plan_asks_for_it(monkeypatch):
    plan = Plan().with_overrides(["serve.batch_invariant=true"])
    engine = load_engine("random:llama:tiny", plan, device="cpu")
    assert type(engine._executor._model.vocabulary).__name__ == "InvariantVocabulary"
    monkeypatch.setattr(native, "kernels", lambda: None)
    with pytest.raises(ConfigError, match="a machine without a C compiler"):
        load_engine("random:llama:tiny", plan, device="cpu")


@pytest.mark.parametrize(
    ("name", "obstacle"), [("mixtral", "experts"), ("gpt2", "a layer norm")], ids=str
)
def test_what_has_no_such_kernel_is_refused(name, obstacle):
    plan = Plan().with_overrides(["serve.batch_invariant=true"])
    with pytest.raises(ConfigError, match=obstacle):
        load_engine(f"random:{name}:tiny", plan, device="cpu")
