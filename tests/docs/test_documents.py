"""The documents are true: what is generated is fresh, what is named exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROMISED = {
    "fetch": "NAME --json",
    "doctor": "--json",
    "report": "RUN_DIR -o --tensorboard --json",
    "train": "MODEL --data --eval-data --plan --steps --out --nproc --resume --set --dtype --json",
    "verify": "--plan --model --json",
    "generate": "MODEL --prompt --max-tokens --temperature --top-p --top-k --seed --stop --adapter",
    "chat": "MODEL --max-tokens --temperature --top-p --top-k --seed --stop",
    "serve": "MODEL --host --port --served-model-name --api-key-file --plan",
    "check": "PLAN --model --json",
    "checkpoint inspect": "DIR",
    "checkpoint verify": "DIR",
    "checkpoint export": "DIR -o --merge",
    "bench": "NAME --against",
}
PLAN_KEYS = """
mesh: pp dp_replicate dp_shard cp tp ep
zero: stage
tensor: sequence_parallel
pipeline: schedule num_microbatches stages_per_rank stage_cuts vocabulary
context: method
expert: dispatch balance_loss_weight
memory: remat
precision: params compute reduce
replicas: method
train: sequence_length tokens_per_step seed pack answers_only long_documents
peft: method targets rank alpha virtual_tokens width
optimizer: name lr betas eps weight_decay clip_norm
optimizer.schedule: kind warmup_steps final_fraction
checkpoint: interval_steps keep levels
resilience: on_failure max_restarts
serve: policy max_batch_tokens max_sequences kv_memory_bytes dtype weights batch_invariant draft
serve.mesh: tp pp ep replicas
serve.limits: max_queued_requests max_requests_per_key max_body_bytes request_timeout_s
"""


def test_generated_parts_are_fresh():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", PROMISED)
def test_no_promised_flag_is_gone(command):
    contract = (ROOT / "docs" / "contract.md").read_text()
    line = re.search(rf"^paceline {command} .*$", contract, re.MULTILINE)
    assert line, f"docs/contract.md does not know {command}"
    words = set(re.split(r"[\s|\[\].]+", line[0]))
    assert set(PROMISED[command].split()) <= words


def test_no_promised_plan_key_is_gone():
    contract = (ROOT / "docs" / "contract.md").read_text()
    for line in PLAN_KEYS.strip().splitlines():
        table, keys = line.split(": ")
        block = re.search(rf"^\[{re.escape(table)}\]\n((?:[^\[\n`].*\n)+)", contract, re.MULTILINE)
        assert block, f"docs/contract.md does not know [{table}]"
        assert set(keys.split()) <= set(re.findall(r"^(?:# )?(\w+)", block[1], re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_tours_files_exist():
    tour = (ROOT / "docs" / "tour.md").read_text()
    paths = set(re.findall(r"`([a-z_/]+/[a-z_/0-9]+\.py)`", tour))
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / "src" / "paceline" / path).exists()] == []


def test_every_technique_states_its_source_and_cost():
    text = (ROOT / "docs" / "techniques.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    chosen_by_plan = [section for section in sections if not section.startswith("model_type")]
    assert len(chosen_by_plan) >= 3
    for section in chosen_by_plan:
        for technique in re.split(r"^### ", section, flags=re.MULTILINE)[1:]:
            for label in ("Source:", "Replaces:", "Needs:", "Forbids:", "Cost:", "Differs:"):
                assert label in technique, f"{technique.splitlines()[0]} lacks {label}"
