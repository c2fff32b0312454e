"""Words spread over a pipeline's ranks: what runs is what was planned; what cannot is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.core.errors import PacelineError
from paceline.data.batch import IGNORED, Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.kernels.cross_entropy import Statistics, local_statistics
from paceline.models.decoder import Decoder
from paceline.models.families.llama import PRESETS
from paceline.models.layout import Layout
from paceline.models.weights import RandomWeights
from paceline.parallel.apply import apply
from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.communicate import add_transfers
from paceline.parallel.pipeline.partition import word_costs
from paceline.parallel.pipeline.vocabulary_passes import spread_vocabulary
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, PrecisionConfig
from paceline.train.objective.next_token import next_token

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

CPU = torch.device("cpu")
M, B, T = 4, 2, 7
SPEC = replace(PRESETS["tiny"], vocab_size=43, num_layers=4, tied_embeddings=False)


def batches() -> list[Batch]:
    """Micro-batches with unequal numbers of labels, one without any."""
    generator = torch.Generator().manual_seed(4)
    found: list[Batch] = []
    for microbatch in range(M):
        tokens_BT = torch.randint(0, SPEC.vocab_size, (B, T + 1), generator=generator)
        labels_BT = tokens_BT[:, 1:].clone()
        labels_BT[:, T - microbatch * 2 :] = IGNORED
        if microbatch == 1:
            labels_BT[:] = IGNORED
        documents_BT = torch.zeros(B, T, dtype=torch.long)
        found.append(Batch(tokens_BT[:, :-1].contiguous(), labels_BT, documents_BT))
    return found


def plan_of(schedule: str = "one-f-one-b", *, pp: int = 2, dtype: str = "float64", **more: Any):
    options = {
        "schedule": schedule,
        "stages_per_rank": SCHEDULES.load(schedule).min_stages_per_rank,
    }
    precision = {"params": "float64" if dtype == "float64" else "float32", "compute": dtype}
    return Plan(
        mesh=MeshConfig(pp=pp),
        pipeline=PipelineConfig.from_dict(options | more),
        precision=PrecisionConfig.from_dict(precision | {"reduce": precision["params"]}),
    )


def over_ranks(plan: Plan, work: Callable[[Any], Any]) -> list[Any]:
    """What a function of the model on each rank gives."""

    def run(rank: int) -> Any:
        world = World(plan.mesh, rank, CPU)
        return work(apply(SPEC, RandomWeights(SPEC, seed=3), plan, world))

    return [run(0)] if plan.mesh.num_ranks == 1 else run_ranks(run, plan.mesh.num_ranks)


def trained(model: Any) -> tuple[float, float, dict[str, Any]]:
    """The loss of an evaluation and of a step, and the gradients."""
    evaluated = model.passes.evaluate(batches()[:3], next_token)
    loss = model.passes.train(batches(), next_token, lambda loss: loss / 10)
    model.finish_gradients()
    gradients = {n: (p.gradient, p.place.box.slices) for n, p in model.parts.items()}
    found = {n: (g.double().numpy(), s) for n, (g, s) in gradients.items() if g is not None}
    return float(evaluated), float(loss), found


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize(("schedule", "pp"), [("one-f-one-b", 3), ("v-half", 2)])
def test_ranks_run_what_was_planned(schedule, pp, barriers):
    plan = plan_of(schedule, pp=pp, vocabulary="spread", vocabulary_barriers=barriers)

    def work(model: Any) -> list[str]:
        model.passes.train(batches(), next_token, lambda loss: loss)
        return [str(span.action) for span in model.passes.trace]

    passes = SCHEDULES.load(schedule).actions(pp, plan.pipeline.stages_per_rank, M)
    num_stages = pp * plan.pipeline.stages_per_rank
    length = plan.train.sequence_length
    costs = word_costs(SPEC, length, num_stages=num_stages, num_ranks=pp)
    planned = add_transfers(spread_vocabulary(passes, barriers, costs))
    assert over_ranks(plan, work) == [list(map(str, own)) for own in planned]


@pytest.mark.parametrize("barriers", [1, 2])
def test_in_bfloat16_it_is_as_near_as_edge_stages_are(barriers):
    """To the gradients in float64; each rounds its own way."""
    spread = {"vocabulary": "spread", "vocabulary_barriers": barriers}
    ((evaluated, loss, exact),) = over_ranks(plan_of(pp=1), trained)

    def errors(**options: Any) -> dict[str, float]:
        worst: dict[str, float] = {}
        found = over_ranks(plan_of(dtype="bfloat16", **options), trained)
        assert sum(each[0] for each in found) == pytest.approx(evaluated, rel=1e-2)
        assert sum(each[1] for each in found) == pytest.approx(loss, rel=1e-2)
        for _, _, gradients in found:
            for name, (gradient, slices) in gradients.items():
                whole = exact[name][0]
                error = abs(gradient - whole[slices]).max() / abs(whole).max()
                worst[name] = max(worst.get(name, 0.0), float(error))
        return worst

    edges, ours = errors(), errors(**spread)
    assert ours.keys() == edges.keys()
    assert max(ours.values()) <= 1.5 * max(edges.values()) <= 0.15


def test_a_head_that_wants_logits_is_refused():
    def objective(model: Any, batch: Batch) -> Tensor:
        return model(batch.tokens_BT, Layout.of_documents(batch.documents_BT)).sum()

    _refused(objective, "none of which has all logits.*|hint.*edges")


def test_an_objective_that_changes_the_loss_is_refused():
    _refused(lambda model, batch: 2 * next_token(model, batch), "as it is")


def _refused(objective: Any, message: str) -> None:
    def work(model: Any) -> str:
        # Before a transfer that others wait for: every rank fails by itself.
        try:
            model.passes.train(batches()[:1], objective, lambda loss: loss)
        except PacelineError as error:
            return str(error)
        return ""

    plan = plan_of(vocabulary="spread")

    for said in over_ranks(plan, work):
        assert re.search(message, said), said


def test_a_head_may_make_rows_of_its_own():
    """A head that halves hidden states: the gradient goes back through what it did."""

    def halving(x_BTD: Tensor, output: Any, labels_BT: Tensor) -> Tensor:
        return output.cross_entropy(x_BTD * 0.5, labels_BT, ignored=IGNORED)

    def objective(model: Any, batch: Batch) -> Tensor:
        layout = Layout.of_documents(batch.documents_BT)
        return model(
            batch.tokens_BT, layout, head=lambda x, output: halving(x, output, batch.labels_BT)
        )

    def work(model: Any) -> Any:
        model.passes.train(batches(), objective, lambda loss: loss)
        part = model.parts.get("norm.weight")
        return None if part is None else part.gradient.numpy()

    (expected,) = over_ranks(plan_of(pp=1), work)
    for barriers in (1, 2):
        plan = plan_of(vocabulary="spread", vocabulary_barriers=barriers)
        (found,) = (each for each in over_ranks(plan, work) if each is not None)
        assert abs(found - expected).max() <= 1e-12 * abs(expected).max()


def test_each_rank_holds_its_words_and_no_other():
    def work(model: Any) -> Any:
        module: Decoder = model.module
        return {
            name: (tuple(module.get_parameter(name).shape), model.parts[name].place.box.offsets)
            for name in ("embedding.weight", "head.weight")
        }

    width = SPEC.d_model
    found = over_ranks(plan_of(pp=3, vocabulary="spread"), work)
    for of_rank, (start, size) in zip(found, [(0, 14), (14, 14), (28, 15)], strict=True):
        assert of_rank == dict.fromkeys(of_rank, ((size, width), (start, 0)))


def test_statistics_of_parts_merge_to_those_of_all():
    generator = torch.Generator().manual_seed(1)
    logits_CV = 30 * torch.randn(5, 11, dtype=torch.float64, generator=generator)
    labels_C = torch.tensor([0, 4, 5, 10, 7])
    spans = (range(5), range(5, 6), range(6, 11))
    parts = [
        local_statistics(
            logits_CV[:, span.start : span.stop].clone(), labels_C, span, torch.float64
        )
        for span in spans
    ]
    whole = Statistics.merged([statistics for _, statistics in parts])
    expected = torch.nn.functional.cross_entropy(logits_CV, labels_C, reduction="sum")
    assert whole.loss.item() == pytest.approx(expected.item(), rel=1e-14)
    probabilities = [exps * whole.scale_of(own)[:, None] for exps, own in parts]
    torch.testing.assert_close(
        torch.cat(probabilities, 1), logits_CV.softmax(1), rtol=1e-13, atol=0
    )
