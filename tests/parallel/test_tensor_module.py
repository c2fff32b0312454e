"""Modules of `transformers` over tensor ranks: they train exactly, or are refused with a reason."""

from __future__ import annotations

import re

import peft
import pytest
import torch
import transformers
from tensor_models import BY_VERSION, OTHERS, OURS, REFUSED, build
from torch import nn

import paceline as pl
from paceline.core.errors import ConfigError, RankError, UsageError
from paceline.dist.testing import run_ranks
from paceline.optim.parts import local
from paceline.parallel.module import call_with_tokens
from paceline.parallel.tensor import border, roles
from paceline.plan import groups
from paceline.plan.tensor_rules import Split
from paceline.verify.certify import BOUND

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

ALL = OURS | OTHERS
TOKENS_BT = torch.arange(18).reshape(2, 9) * 5 % 61


def plan(precision: str = "float64", **mesh: int) -> pl.Plan:
    table = dict.fromkeys(("params", "compute", "reduce"), precision)
    tensor = {"tensor": {"sequence_parallel": False}} if mesh.get("tp", 1) > 1 else {}
    return pl.Plan.from_dict({"mesh": mesh, "precision": table, **tensor})


def certify(module: nn.Module, of: pl.Plan) -> None:
    certificate = pl.verify(module, of)
    assert certificate.certified, certificate.worst
    assert certificate.per_parameter.keys() == dict(module.named_parameters()).keys()
    assert 0 < certificate.max_rel_grad_error <= BOUND


@pytest.mark.parametrize("name", ALL)
def test_two_ranks_train_exactly(name):
    certify(build(ALL[name]), plan(tp=2))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "falcon, one key head"])
def test_more_ranks_than_key_heads_train_exactly(name):
    certify(build(ALL[name]), plan(tp=4))


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("qwen3", "dp_shard"),
        ("falcon, one key head", "dp_shard"),
        ("gpt2", "dp_replicate"),
        ("olmo2", "dp_replicate"),
    ],
)
def test_tensor_ranks_beside_data_ranks_train_exactly(name, axis):
    certify(build(ALL[name]), plan(tp=2, **{axis: 2}))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_split_with_the_layers_they_adapt():
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    module = peft.get_peft_model(build(OURS["llama"]), config)
    certify(module, plan(tp=2))

    def run(_rank: int) -> dict[str, str]:
        pl.parallelize(module.double(), plan(tp=2))
        return dict(pl.tensor_rules_of(module).roles)

    attention = "base_model.model.model.layers.0.self_attn."
    for found in run_ranks(run, 2):
        assert found[f"{attention}q_proj.base_layer"] == "column"
        assert found[f"{attention}q_proj.lora_B.default"] == "column"
        assert f"{attention}q_proj.lora_A.default" not in found
        assert found[f"{attention}o_proj.lora_A.default"] == "row"


def split(name: str, of: pl.Plan, **options) -> None:
    """Splits a model on ranks, for what that raises."""
    module = build((ALL | REFUSED)[name]).double()
    run_ranks(lambda _rank: pl.parallelize(module, of, **options) and None, of.mesh.num_ranks)


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_cannot_compute_is_refused_by_name(name):
    with pytest.raises(RankError, match=r"UsageError: transformer\.h\.0\.\w+ cannot be split") as e:
        split(name, plan(tp=2))
    (pattern,) = re.findall(r"tensor_rules={'(\S+)': 'whole'} leaves it whole", str(e.value))
    split(name, plan(tp=2), tensor_rules={pattern: "whole"})


@pytest.mark.parametrize("name", BY_VERSION)
def test_what_is_not_refused_is_exact(name):
    try:
        certify(build(BY_VERSION[name]), plan(tp=2))
    except RankError as error:
        assert "cannot be split" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "tp", "hint"),
    [("llama", 3, "use 2 or 4"), ("gpt2", 3, "use 2 or 4"), ("gemma3, one key head", 3, "use 2")],
)
def test_heads_that_ranks_do_not_divide(name, tp, hint):
    with pytest.raises(RankError, match=rf"mesh\.tp = {tp}: does not share out the 4 heads") as e:
        split(name, plan(tp=tp))
    assert hint in str(e.value)


def test_plans_that_modules_cannot_have():
    module = build(OURS["llama"]).double()
    rows = pl.Plan.from_dict({**plan(tp=2).to_dict(), "tensor": {"sequence_parallel": True}})
    with pytest.raises(ConfigError, match=r"tensor\.sequence_parallel = true: .*of one's own"):
        pl.parallelize(module, rows)
    with pytest.raises(UsageError, match="tensor_rules rule over tensor ranks"):
        pl.parallelize(module, plan(), tensor_rules={"*": "whole"})
    with pytest.raises(UsageError, match="is not split over tensor ranks"):
        pl.tensor_rules_of(module)


class Twice(nn.Module):
    """No transformer: its linear is called twice, its embedding is the head by its own hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 8)
        self.twice = nn.Linear(8, 8)

    def forward(self, tokens_BT):
        x_BTD = self.twice(torch.tanh(self.twice(self.embedding(tokens_BT))))
        return x_BTD @ self.embedding.weight.T


def test_a_module_without_a_layer_to_split():
    with pytest.raises(
        RankError, match="no layer can be split over 2 tensor ranks: embedding: "
    ) as e:
        run_ranks(lambda _rank: pl.parallelize(Twice().double(), plan(tp=2)) and None, 2)
    assert "embedding.weight is used outside embedding too" in str(e.value)
    assert "twice: it is called 2 times in one pass" in str(e.value)


def test_dropout_in_training_is_refused_before_and_after():
    module = build(OURS["gpt2"]).double()

    def before(_rank: int) -> None:
        module.train()
        pl.parallelize(module, plan(tp=2))

    with pytest.raises(RankError, match="UsageError: GPT2LMHeadModel drops features at random"):
        run_ranks(before, 2)

    def after(_rank: int) -> None:
        pl.parallelize(module, plan(tp=2))
        module(input_ids=TOKENS_BT)
        module.train()
        module(input_ids=TOKENS_BT)

    with pytest.raises(RankError, match="UsageError: GPT2LMHeadModel drops features at random"):
        run_ranks(after, 2)


def test_a_refusal_leaves_the_module_as_it_was():
    module = build(REFUSED["bloom"]).double()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = module(input_ids=TOKENS_BT).logits

    def run(_rank: int) -> None:
        with pytest.raises(UsageError):
            pl.parallelize(module, plan(tp=2))
        assert all(torch.equal(before[name], v) for name, v in module.state_dict().items())
        assert torch.equal(module(input_ids=TOKENS_BT).logits, expected)
        assert module.transformer.h[0].mlp.dense_h_to_4h.out_features == 128

    run_ranks(run, 2)


@pytest.mark.parametrize(
    ("rules", "roles_of"),
    [
        ({"*.mlp.*": "whole"}, {"mlp.gate_proj": None, "self_attn.v_proj": "column"}),
        ({"*.0.mlp.*": "whole", "lm_head": "whole"}, {"mlp.up_proj": None}),
        ({"*.q_proj": "column", "*.o_proj": "row"}, {"self_attn.o_proj": "row"}),
        (
            {"*.mlp.down_proj": "whole", "*.mlp.*": "whole", "*.embed_tokens": "vocabulary"},
            {"mlp.down_proj": None},
        ),
        ({"*.q_proj": "whole"}, {"self_attn.q_proj": None, "self_attn.k_proj": "gathered"}),
    ],
    ids=["whole", "first", "as it is", "in order", "alone"],
)
def test_rules_of_ones_own(rules, roles_of):
    module = build(OURS["olmo2"]).double()

    def run(_rank: int) -> dict[str, str | None]:
        pl.parallelize(module, plan(tp=2), tensor_rules=rules)
        found = pl.tensor_rules_of(module).roles
        return {name: found.get(f"model.layers.0.{name}") for name in roles_of}

    assert run_ranks(run, 2) == [roles_of] * 2


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*.q_proj": "row"}, "q_proj cannot be row: what it computes makes it column"),
        ({"*.gate_proj": "whole"}, "cannot be whole alone: it is split together with .*up_proj"),
        ({"*.gate": "column"}, r"'\*.gate' matches no linear or embedding"),
        ({"*": "colum"}, "did you mean column"),
        ({"*.embed_tokens": "row"}, "cannot be row"),
    ],
)
def test_rules_that_contradict_the_module(rules, message):
    with pytest.raises(RankError, match=message):
        split("llama", plan(tp=2), tensor_rules=rules)


class Alone(nn.Module):
    """Linears that no other closes: split only by one's own rules."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(31, 8)
        self.places = nn.Embedding(16, 8)
        self.first = nn.Linear(8, 7)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 9)
        self.head = nn.Linear(9, 31)

    def forward(self, tokens_BT):
        x_BTD = self.words(tokens_BT) + self.places(torch.arange(tokens_BT.shape[1]))
        return self.head(torch.tanh(self.second(self.norm(self.first(x_BTD)))).softmax(-1))


RULES = {"first": "column", "second": "row", "places": "vocabulary"}


def test_layers_that_are_split_alone():
    tokens_BT = TOKENS_BT % 31
    module = Alone().double()
    module(tokens_BT).square().sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()

    def run(rank: int) -> None:
        parallel = pl.parallelize(module, plan(tp=2), tensor_rules=RULES)
        assert parallel is module
        rules = pl.tensor_rules_of(module)
        assert rules.roles["first"] == rules.roles["head"] == "gathered"
        assert rules.roles["second"] == "scattered"
        parallel(tokens_BT).square().sum().backward()
        for name, parameter in module.named_parameters():
            own = rules.splits.get(name, Split())
            part = expected[name]
            if own.dim is not None:
                part = part.index_select(own.dim, torch.tensor(own.indices(rank)))
            largest = expected[name].abs().max()
            assert (parameter.grad - part).abs().max() <= BOUND * largest, name

    run_ranks(run, 2)


def defect_shares(monkeypatch):
    """Rows of the other rank's heads."""
    right = groups._rows_of

    def mirrored(links, source, columns):
        width = max(span.columns.stop for link in links for span in link.spans)
        return right(links, source, range(width - columns.stop, width - columns.start))

    monkeypatch.setattr(groups, "_rows_of", mirrored)


def defect_bias(monkeypatch):
    """A bias that every rank adds."""

    def product(self, x, *, bias):  # noqa: ARG001
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)

    monkeypatch.setattr(roles.Role, "product", product)


@pytest.mark.parametrize("defect", [defect_shares, defect_bias])
def test_a_wrong_rule_is_refused_before_it_trains(monkeypatch, defect):
    defect(monkeypatch)
    with pytest.raises(RankError, match=r"cannot be split over 2 tensor ranks at .*sum up to some"):
        split("phi", plan(tp=2))


def forget_to_enter(monkeypatch):
    monkeypatch.setattr(border, "copy_in", lambda x, world: x)  # noqa: ARG005


def forget_to_share(monkeypatch):
    monkeypatch.setattr(border.Ranks, "share", lambda self, parameter, split: parameter)  # noqa: ARG005


@pytest.mark.parametrize(
    ("defect", "name", "tp"),
    [(forget_to_enter, "qwen3", 2), (forget_to_share, "llama", 4)],
    ids=["input", "copied rows"],
)
def test_gradients_that_are_not_summed_are_seen(monkeypatch, defect, name, tp):
    defect(monkeypatch)
    certificate = pl.verify(build(OURS[name]), plan(tp=tp))
    assert not certificate.certified
    assert certificate.max_rel_grad_error > 1e-3


def loss_of(module: nn.Module) -> torch.Tensor:
    logits_BTV = call_with_tokens(module, TOKENS_BT, use_cache=False).logits
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), TOKENS_BT.roll(-1, 1).flatten())


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", {"tp": 2}),
        ("llama", {"tp": 4}),
        ("gpt2", {"tp": 2, "dp_replicate": 2}),
        ("falcon, one key head", {"tp": 2, "dp_shard": 2}),
        ("llama", {"dp_shard": 2}),
    ],
)
def test_the_norm_counts_every_element_once(name, mesh):
    alone, module = build(ALL[name]).double(), build(ALL[name]).double()
    loss_of(alone).backward()
    expected = sum(float(p.grad.square().sum()) for p in alone.parameters()) ** 0.5
    gradients = {name: p.grad * (0.1 / expected) for name, p in alone.named_parameters()}
    of = plan(**mesh)

    def run(rank: int) -> float:
        parallel = pl.parallelize(module, of)
        loss_of(parallel).backward()
        norm = pl.clip_gradients(parallel, 0.1)
        if "dp_shard" not in mesh:
            rules = pl.tensor_rules_of(parallel)
            for key, parameter in module.named_parameters():
                own, part = rules.splits.get(key, Split()), gradients[key]
                if own.dim is not None:
                    index = torch.tensor(own.indices(of.mesh.coordinate(rank)["tp"]))
                    part = part.index_select(own.dim, index)
                assert torch.allclose(local(parameter.grad), part, rtol=0, atol=1e-13), key
        return norm

    for norm in run_ranks(run, of.mesh.num_ranks):
        assert abs(norm - expected) <= BOUND * expected
    assert expected > 0.1, "something was clipped"


def test_the_norm_of_a_module_in_one_process():
    module = build(OURS["llama"])
    loss_of(module).backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    norm = pl.clip_gradients(module, 1e9)
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
    assert abs(pl.clip_gradients(module, norm / 2) - norm) <= 1e-6 * norm
    assert abs(pl.clip_gradients(module, norm) - norm / 2) <= 1e-5 * norm


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("llama", {"tp": 4}), ("gpt2", {"tp": 2, "dp_shard": 2}), ("phi3", {"tp": 2})],
)
def test_the_whole_state_is_what_one_process_has(name, mesh, tmp_path):
    module = build(OURS[name] if name in OURS else OTHERS[name]).double()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    config = module.config

    def run(rank: int) -> bool:
        parallel = pl.parallelize(module, plan(**mesh))
        state = pl.whole_state(parallel)
        if rank:
            return state == {}
        assert state.keys() == before.keys()
        assert all(torch.equal(state[key], value) for key, value in before.items())
        module.config = config
        module.save_pretrained(tmp_path, state_dict=state)
        return True

    assert all(run_ranks(run, plan(**mesh).mesh.num_ranks))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(v, before[key]) for key, v in again.state_dict().items())


def test_evaluation_goes_on_with_a_cache():
    """A split model generates what the whole one does."""
    module = build(OURS["llama"]).double()
    expected = module.generate(TOKENS_BT, max_new_tokens=5, do_sample=False)

    def run(_rank: int) -> list[list[int]]:
        parallel = pl.parallelize(module, plan(tp=2))
        return parallel.generate(TOKENS_BT, max_new_tokens=5, do_sample=False).tolist()

    assert run_ranks(run, 2) == [expected.tolist()] * 2


def test_every_rank_begins_with_the_first_ones_weights():
    def run(rank: int) -> float:
        torch.manual_seed(rank)
        module = transformers.AutoModelForCausalLM.from_config(OURS["llama"]()).double().eval()
        return loss_of(pl.parallelize(module, plan(tp=2))).item()

    first, second = run_ranks(run, 2)
    assert first == second
