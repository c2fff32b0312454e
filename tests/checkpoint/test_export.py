"""Out of a checkpoint into a model folder: `transformers` reads it, and no bit is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from paceline.checkpoint.export import export
from paceline.checkpoint.save import save as save_checkpoint
from paceline.core.errors import DataError, UsageError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.hf import FolderWeights
from paceline.models.hub import resolve
from paceline.models.tokenizer import byte_tokenizer, tokenizer_files
from paceline.models.weights import build
from paceline.optim import OPTIMIZERS
from paceline.parallel.apply import apply
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan, ZeroConfig
from paceline.train.state import State

pytestmark = pytest.mark.cpu


def saved(model: str, folder: Path, plan: Plan | None = None, rank: int = 0) -> Path:
    """An untrained checkpoint of a model."""
    plan, source = plan or Plan(), resolve(model)
    world = World(plan.mesh, rank, torch.device("cpu"))
    parallel = apply(source.spec, source.weights, plan, world)
    state = State(parallel, OPTIMIZERS.load("adamw")(parallel.parameters(), plan.optimizer))
    return save_checkpoint(folder, 1, state.parts(), plan, source.spec, world)


def exported(model: str, tmp_path: Path, plan: Plan | None = None) -> Path:
    """A model through a checkpoint and out again."""
    if plan is None:
        saved(model, tmp_path)
    else:
        run_ranks(lambda rank: str(saved(model, tmp_path, plan, rank)), plan.mesh.num_ranks)
    export(tmp_path / "step-1", resolve(model).files, tmp_path / "out")
    return tmp_path / "out"


def transformers_folder(folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    """A random Llama as `transformers` saves it, with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, **options)).to(dtype)
    model.save_pretrained(folder)
    for name, text in tokenizer_files(byte_tokenizer()).items():
        (folder / name).write_text(text)
    return folder


def test_transformers_gives_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported("random:llama:tiny", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = resolve("random:llama:tiny")
    ours = apply(source.spec, source.weights, Plan(), World(MeshConfig(), 0, torch.device("cpu")))
    tokens = AutoTokenizer.from_pretrained(folder)("pedal", return_tensors="pt")["input_ids"]
    assert tokens.tolist() == [source.tokenizer.encode("pedal")]
    tokens_BT = torch.cat([tokens, tokens.flip(1)])
    with torch.no_grad():
        expected, found = theirs(tokens_BT).logits, ours.module(tokens_BT)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float(expected.std()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_tied", [True, False])
def test_import_then_export_keeps_every_bit(tmp_path, dtype, is_tied):
    options = {"tie_word_embeddings": is_tied, "attention_bias": True}
    original = transformers_folder(tmp_path / "original", dtype, **options)
    folder = exported(str(original), tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (original, folder))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) != is_tied
    for name, value in before.items():
        assert after[name].dtype == value.dtype == dtype
        assert torch.equal(after[name], value), name
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (folder / name).read_bytes() == (original / name).read_bytes()


@pytest.mark.ranks
@pytest.mark.parametrize(
    "plan",
    [
        Plan(mesh=MeshConfig(dp_shard=2)),
        Plan(mesh=MeshConfig(dp_replicate=2)),
        Plan(mesh=MeshConfig(dp_shard=2), zero=ZeroConfig(stage=1)),
        Plan(mesh=MeshConfig(dp_shard=2), zero=ZeroConfig(sharder="own")),
    ],
    ids=lambda plan: f"{plan.mesh.num_ranks} ranks, stage {plan.zero_technique}",
)
def test_an_export_is_the_same_file_from_any_layout(tmp_path, plan):
    alone = exported("random:llama:tiny", tmp_path / "alone")
    ranks = exported("random:llama:tiny", tmp_path / "ranks", plan)
    again = exported(str(alone), tmp_path / "again")
    contents = [(folder / "model.safetensors").read_bytes() for folder in (alone, ranks, again)]
    assert contents[0] == contents[1] == contents[2]


def test_an_existing_folder_is_left_alone(tmp_path):
    folder = exported("random:llama:tiny", tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match="exists already") as caught:
        export(tmp_path / "step-1", resolve("random:llama:tiny").files, folder)
    assert caught.value.hint == "export to a new folder"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_damaged_checkpoint_leaves_no_folder(tmp_path):
    checkpoint = saved("random:llama:tiny", tmp_path)
    content = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 4
    (checkpoint / "__0_0.distcp").write_bytes(content)
    with pytest.raises(DataError, match=r"__0_0\.distcp is damaged"):
        export(checkpoint, resolve("random:llama:tiny").files, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"step-1"}


def test_weights_are_exported_in_the_dtype_of_their_config(tmp_path):
    source = resolve("random:llama:tiny")
    checkpoint = saved("random:llama:tiny", tmp_path)
    config = json.loads(source.files["config.json"]) | {"dtype": "bfloat16"}
    files = source.files | {"config.json": json.dumps(config)}
    export(checkpoint, files, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    expected = source.weights.read("blocks.0.ffn.up.weight").bfloat16()
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], expected)


# What others read

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mixtral", "gpt2")


def exported_in_shards(family: str, folder: Path, shard_bytes: int) -> Path:
    """A checkpoint of two ranks' state, exported in files of few bytes."""
    plan = Plan(mesh=MeshConfig(dp_shard=2), zero=ZeroConfig(sharder="own"))
    model = f"random:{family}:tiny"
    run_ranks(lambda rank: str(saved(model, folder, plan, rank)), 2)
    export(folder / "step-1", resolve(model).files, folder / "out", shard_bytes=shard_bytes)
    return folder / "out"


def iterate_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, file by file, as serving engines load folders that they know nothing of."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.exists():
        listed = json.loads(index.read_text())["weight_map"]
        assert {file.name for file in files} == set(listed.values())
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (it is no mapping)
                assert not index.exists() or listed[name] == file.name
                yield name, content.get_tensor(name)


@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
def test_others_read_an_export_in_shards_of_every_family(tmp_path, family):
    """By `transformers`, and by a loader that walks the files and looks names up in a model that
    config.json's architecture names.
    """
    import transformers

    limit = 100_000
    folder = exported_in_shards(family, tmp_path, limit)
    weights = dict(iterate_weights(folder))
    assert len(list(folder.glob("*.safetensors"))) > 2
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            sizes = [content.get_tensor(n).nbytes for n in content.keys()]  # noqa: SIM118
        # A stack of Mixtral's experts, published one by one, is one parameter.
        assert sum(sizes) <= limit or len(sizes) == 1 or family == "mixtral"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    assert not (folder / "model.safetensors").exists()

    config = transformers.AutoConfig.from_pretrained(folder)
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    theirs = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    assert theirs.config.model_type == config.model_type
    tokens_BT = torch.arange(12).view(2, 6)
    source = resolve(f"random:{family}:tiny")
    ours = apply(source.spec, source.weights, Plan(), World(MeshConfig(), 0, torch.device("cpu")))
    with torch.no_grad():
        expected, found = theirs(tokens_BT).logits, ours.module(tokens_BT)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())

    again = FolderWeights(folder, source.spec)
    for name, _ in build(source.spec).named_parameters():
        assert torch.equal(again.read(name), source.weights.read(name)), name


def test_few_bytes_are_one_file_as_ever(tmp_path):
    folder = exported("random:llama:tiny", tmp_path)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
