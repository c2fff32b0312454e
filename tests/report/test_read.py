"""What counts of a run's records."""

from __future__ import annotations

import json

import pytest

from paceline.core.errors import DataError, UsageError
from paceline.plan.plan import Plan
from paceline.report.read import read_log, read_run

START = {
    "kind": "run",
    "model": "m",
    "num_steps": 9,
    "num_ranks": 1,
    "device": "a device",
    "peak_flops": 1e9,
    "paceline": "0",
    "torch": "2",
}


def start(first_step, **changes):
    return START | {"first_step": first_step} | changes


def step(number, loss, **changes):
    values = {
        "kind": "step",
        "step": number,
        "loss": loss,
        "grad_norm": 2.0,
        "clip_factor": 0.5,
        "learning_rate": 1e-3,
        "tokens": 100,
        "valid_tokens": 90,
        "tokens_per_s": 50.0,
        "time_s": 2.0,
        "peak_share": 0.25,
        "memory_bytes": 1 << 30,
    }
    return values | changes


def evaluation(number, loss):
    return {
        "kind": "eval",
        "step": number,
        "loss": loss,
        "perplexity": 2.0,
        "tokens": 9,
        "time_s": 1,
    }


def save(number):
    return {"kind": "save", "step": number, "path": "p", "time_s": 0.1}


def write_run(folder, *ranks, plan=None, tail=""):
    """A run's folder, records of each rank as given."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    (folder / "plan.toml").write_text((plan or Plan()).to_toml())
    (folder / "run.toml").write_text('model = "m<1>"\ndata = "text & more.txt"\nsteps = 9\n')
    for rank, records in enumerate(ranks):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "records" / f"rank-{rank}.jsonl").write_text(lines + tail)
    return folder


def test_the_later_word_counts():
    log = read_log(
        0,
        [
            *(
                start(1),
                evaluation(0, 9.0),
                step(1, 5.0),
                step(2, 4.0),
                save(2),
                evaluation(2, 4.5),
            ),
            *(step(3, 3.0), step(4, 2.0), save(4), evaluation(4, 2.5)),
            *(start(3), step(3, 3.5), evaluation(3, 3.6)),
        ],
    )
    assert [(s["step"], s["loss"]) for s in log.steps] == [(1, 5.0), (2, 4.0), (3, 3.5)]
    assert [(e["step"], e["loss"]) for e in log.evaluations] == [(0, 9.0), (2, 4.5), (3, 3.6)]
    assert [s["step"] for s in log.saves] == [2]
    assert len(log.starts) == 2


def test_kinds_that_it_does_not_know_are_passed_over():
    log = read_log(0, [{"kind": "fault", "what": 1}, start(1), step(1, 1.0)])
    assert len(log.steps) == 1


def test_a_run_that_is_being_written(tmp_path):
    ranks = [
        [start(1), step(1, 5.0, time_s=9.0, memory_bytes=3), step(2, 4.0, memory_bytes=4)],
        [start(1), step(1, 5.0, memory_bytes=7), step(2, 4.0, memory_bytes=6)],
    ]
    run = read_run(write_run(tmp_path, *ranks, tail='{"kind": "st'))
    assert run.summary() == {
        "model": "m<1>",
        "steps": 2,
        "num_steps": 9,
        "loss": 4.0,
        "eval_loss": None,
        "perplexity": None,
        "tokens": 200,
        "tokens_per_s": 50.0,
        "peak_share": 0.25,
        "time_s": 11.0,
        "memory_bytes": 7,
        "worst_rank": 1,
        "ranks": 2,
        "saves": 0,
        "resumptions": 0,
    }
    assert run.first.median("time_s") == 2.0  # the first step warms up


def test_ranks_are_in_order(tmp_path):
    run = read_run(write_run(tmp_path, *([start(1), step(1, 1.0)] for _ in range(12))))
    assert [log.rank for log in run.ranks] == list(range(12))


def test_what_differs_from_the_defaults(tmp_path):
    plan = Plan.from_dict({"mesh": {"dp_shard": 2}, "zero": {"stage": 3}})
    run = read_run(write_run(tmp_path, [start(1), step(1, 1.0)], plan=plan))
    assert run.changed == {"mesh.dp_shard", "zero.stage"}
    assert run.plan["mesh.dp_shard"] == 2
    assert run.plan["train.sequence_length"] == 512


def test_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match=r"is not a run folder: it has no run\.toml"):
        read_run(tmp_path)
    for records in ([], [start(1)]):
        folder = write_run(tmp_path / str(len(records)), records)
        with pytest.raises(UsageError, match="has no step in its records yet"):
            read_run(folder)
    with pytest.raises(UsageError, match="has no step in its records yet"):
        read_run(write_run(tmp_path / "none"))
    broken = write_run(tmp_path / "broken", [start(1), step(1, 1.0)])
    path = broken / "records" / "rank-0.jsonl"
    path.write_text("{broken}\n" + path.read_text())
    with pytest.raises(DataError, match="line 1: not a record"):
        read_run(broken)
