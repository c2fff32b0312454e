"""How a module of one's own is split over tensor ranks: rules, and rules in the making."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from paceline.core.errors import UsageError
from paceline.plan.module_graph import Leaf, ModuleGraph
from paceline.plan.tensor_rules import Split, even_share

RoleName = Literal["column", "row", "gathered", "scattered", "vocabulary", "inside", "taken"]
"""What a module does at the border between what is whole and what is split:

    column      whole input, split output
    row         split input, output a sum over ranks
    gathered    whole input, output split and then gathered
    scattered   whole input, of which its share is taken; output a sum over ranks
    vocabulary  an embedding: each rank looks up its own words; output a sum over ranks
    inside      split input and output, whole parameters: their gradients are sums over ranks
    taken       all of it whole, but of its output a rank goes on with its share
"""


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that are split together.

    Attributes:
        columns: split by outputs.
        rows: split by inputs; they close the group.
        taken: leaves that are whole and whose output is split.
        num_parts: how many parts there are to share out: heads, or hidden features.
        num_units: parts of which no two share a row: key heads, where these are fewer.
        is_heads: whether parts are of several rows, which modules tend to count.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    taken: tuple[str, ...]
    num_parts: int
    num_units: int
    is_heads: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """How a module is split.

    Attributes:
        tp: ranks that share it.
        splits: parameter to its split; those that are absent are whole.
        roles: module to its role; those that are absent have none.
        taken: module whose role is taken or scattered to the split of its output or input.
        groups: what is split together.
        whole: linear or embedding that is left whole to the reason.
    """

    tp: int
    splits: Mapping[str, Split]
    roles: Mapping[str, RoleName]
    taken: Mapping[str, Split] = field(default_factory=dict[str, Split])
    groups: tuple[Group, ...] = ()
    whole: Mapping[str, str] = field(default_factory=dict[str, str])


class Draft:
    """Rules in the making."""

    def __init__(self, graph: ModuleGraph, tp: int) -> None:
        self.graph = graph
        self.tp = tp
        self.leaves = {leaf.name: leaf for leaf in graph.leaves}
        self.splits: dict[str, Split] = {}
        self.roles: dict[str, RoleName] = {}
        self.taken: dict[str, Split] = {}
        self.groups: list[Group] = []
        self.whole: dict[str, str] = {}

    def is_bound(self, leaf: Leaf) -> str:
        """Why a leaf's parameters cannot be split whatever the graph says, or nothing."""
        if leaf.num_calls > 1:
            return f"it is called {leaf.num_calls} times in one pass"
        for kind in leaf.shapes:
            name = f"{leaf.name}.{kind}"
            if name in self.graph.direct:
                return f"{name} is used outside {leaf.name} too"
            ties = next((names for names in self.graph.tied if name in names), ())
            if any(other.rpartition(".")[0] not in self.roles for other in ties if other != name):
                return f"{name} is {' and '.join(n for n in ties if n != name)} too"
        return ""

    def split_outputs(self, leaf: Leaf, shares: tuple[tuple[range, ...], ...]) -> None:
        self.splits[f"{leaf.name}.weight"] = Split(leaf.output_dim, shares)
        if "bias" in leaf.shapes:
            self.splits[f"{leaf.name}.bias"] = Split(0, shares)

    def leave_whole(self, name: str) -> None:
        """Takes back the split of a layer that nothing else rests on, as the user wants."""
        if self.roles.get(name) == "gathered":
            del self.roles[name]
            for kind in self.leaves[name].shapes:
                self.splits.pop(f"{name}.{kind}", None)
            self.whole[name] = "so the override says"

    def rules(self) -> Rules:
        for leaf in self.graph.leaves:
            if leaf.kind != "other" and leaf.name not in self.roles:
                reason = self.is_bound(leaf) or "its output is read as a whole"
                self.whole.setdefault(leaf.name, reason)
        if not self.splits:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.whole.items())[:3])
            raise UsageError(
                f"no layer can be split over {self.tp} tensor ranks: {reasons or 'none is linear'}",
                hint="mesh.tp = 1, and mesh.dp_shard to share the parameters",
            )
        whole = {name: why for name, why in self.whole.items() if name not in self.roles}
        return Rules(self.tp, self.splits, self.roles, self.taken, tuple(self.groups), whole)


def even_shares(size: int, tp: int) -> tuple[tuple[range, ...], ...]:
    return tuple((even_share(size, tp, rank),) for rank in range(tp))
