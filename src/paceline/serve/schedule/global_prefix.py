"""A job known whole: requests that share a prefix run together, those with long answers first.

Source: Zheng et al., BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing
    and Throughput-oriented Token Batching, arXiv:2412.03594.
Replaces: stall-free, for jobs.  Needs: nothing.  Forbids: nothing.
Cost: O(tokens) to order a job; room is kept for the longest answer.
Differs: prefixes are shared on every level of their tree, not on one, and in whole blocks; one
    attention kernel serves shared and own keys alike; requests that come one by one keep their
    order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from paceline.serve.schedule.base import Asked, Budget, StepPlan, View
from paceline.serve.schedule.room import Room


class GlobalPrefix:
    """The policy, and its order of a job.

    In the order of a walk through the tree of prefixes, all that a request can find of earlier ones
    is found by the request just before it too. So it is in the cache, however few blocks there are,
    as long as nobody passes another and nobody is preempted.
    """

    def __call__(self, view: View, budget: Budget, now_s: float) -> StepPlan:  # noqa: ARG002
        """As many requests as memory holds to their ends; decodes first, then prompts."""
        room = Room(view, budget, to_end=True)
        room.go_on_all()
        room.admit_all(passing=False)
        return room.plan()

    def arrange(self, job: Sequence[Asked], block_size: int) -> list[int]:
        """Walks through the tree; where it parts, to the larger share of answers first."""
        tree = _Node()
        for place, asked in enumerate(job):
            _insert(tree, place, asked, block_size)
        order: list[int] = []
        open_nodes = [tree]
        while open_nodes:
            node = open_nodes.pop()
            # Who ends with a full block computes that block in any case: others then find it.
            order += sorted(
                node.ends,
                key=lambda place: (
                    len(job[place].prompt_ids) % block_size > 0,
                    -job[place].num_answer / len(job[place].prompt_ids),
                ),
            )
            children = sorted(node.children.values(), key=_Node.answers_to_prompts, reverse=True)
            open_nodes += reversed(children)
        return order


global_prefix = GlobalPrefix()


@dataclass(slots=True)
class _Node:
    """A block of some prompts, after the blocks above it.

    Attributes:
        num_prompt: tokens of prompts from here on down, shared ones counted once.
        num_answer: tokens of the answers to these prompts.
        ends: places of the requests that have no full block below.
        children: by content.
    """

    num_prompt: int = 0
    num_answer: int = 0
    ends: list[int] = field(default_factory=list)
    children: dict[Hashable, _Node] = field(default_factory=dict)

    def answers_to_prompts(self) -> float:
        """Tokens of answers for one of prompts."""
        return self.num_answer / max(1, self.num_prompt)


def _insert(tree: _Node, place: int, asked: Asked, block_size: int) -> None:
    """Puts a request's prompt into the tree: its root, then its full blocks."""
    ids = asked.prompt_ids
    path = [tree, tree.children.setdefault(asked.root, _Node())]
    num_shared = 0  # of its first blocks
    for start in range(0, len(ids) - block_size + 1, block_size):
        content = tuple(ids[start : start + block_size])
        children = path[-1].children
        num_shared += content in children
        path.append(children.setdefault(content, _Node()))
    path[-1].ends.append(place)
    for depth, node in enumerate(path):
        num_above = max(num_shared, depth - 2)
        node.num_prompt += len(ids) - num_above * block_size
        node.num_answer += asked.num_answer
