"""Tensor-parallel rules derived from what a model computes; no names of models or layers.

Source: Li et al., Redco, arXiv:2310.16355, Sec. 3.1 (rules for any transformer); Shoeybi et al.,
    Megatron-LM, arXiv:1909.08053, Sec. 3.
Replaces: tables written by hand for each architecture.  Needs: a graph of one call.
Forbids: layers that are called several times; they are whole.
Differs: Redco alternates splits by the order of layers; here a set of linears is split by outputs
    where one sum closes it: where their rows meet nowhere but in linears that are split by inputs,
    and rows of different shares meet nowhere at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from paceline.core.errors import UsageError, name_hint
from paceline.plan.groups import components, split_group
from paceline.plan.module_graph import ModuleGraph
from paceline.plan.module_rules import Draft, Rules, even_shares
from paceline.plan.tensor_rules import Split

OVERRIDES = ("column", "row", "vocabulary", "whole")


def derive(graph: ModuleGraph, tp: int, overrides: Mapping[str, str] | None = None) -> Rules:
    """Rules for a graph.

    Args:
        graph: of one call.
        tp: ranks.
        overrides: patterns of module names to ``column``, ``row``, ``vocabulary`` or ``whole``,
            the first that matches counts. A linear that the graph leaves whole may be split
            alone, its output gathered or its input scattered; what the graph splits may be whole,
            all members of a group together.

    Raises:
        ConfigError: heads that `tp` does not divide.
        UsageError: an override that matches nothing or contradicts the graph; or nothing can
            be split.
    """
    asked = _asked(graph, overrides or {})
    draft = Draft(graph, tp)
    _split_vocabulary(draft, asked)
    for columns_of, rows_of in components(graph):
        names = {leaf.name for leaf in (*columns_of, *rows_of)}
        if _is_left_whole(names, asked):
            draft.whole |= dict.fromkeys(names, "so the override says")
            continue
        reason = split_group(draft, columns_of, rows_of)
        if reason:
            draft.whole |= {name: draft.whole.get(name, reason) for name in names}
    for name in [name for name, wanted in asked.items() if wanted == "whole"]:
        draft.leave_whole(name)
    _split_alone(draft, asked)
    _refuse_contradictions(draft, asked)
    return draft.rules()


def _asked(graph: ModuleGraph, overrides: Mapping[str, str]) -> dict[str, str]:
    """Leaf to what the user has asked for."""
    asked: dict[str, str] = {}
    names = [leaf.name for leaf in graph.leaves if leaf.kind != "other"]
    for pattern, role in overrides.items():
        if role not in OVERRIDES:
            raise UsageError(f"tensor rule {pattern!r}: {role!r}", hint=name_hint(role, OVERRIDES))
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            hint = name_hint(pattern, names[:8])
            raise UsageError(f"tensor rule {pattern!r} matches no linear or embedding", hint=hint)
        asked |= {name: role for name in matched if name not in asked}
    return asked


def _split_vocabulary(draft: Draft, asked: Mapping[str, str]) -> None:
    """The embedding of the tokens and the head by words; a tied pair together or not at all."""
    graph, tp = draft.graph, draft.tp
    pairs = [leaf for leaf in graph.leaves if leaf.kind == "embedding" and leaf.reads_tokens]
    words = {leaf.num_outputs for leaf in pairs}
    pairs += [
        leaf
        for leaf in graph.leaves
        if leaf.is_linear and leaf.name in graph.outputs and leaf.num_outputs in words
    ]
    refused = {leaf.name for leaf in pairs if asked.get(leaf.name) == "whole"}
    chosen = [leaf for leaf in pairs if leaf.name not in refused and leaf.num_outputs >= tp]
    draft.roles |= {
        leaf.name: "vocabulary" if leaf.kind == "embedding" else "gathered" for leaf in chosen
    }
    # Of a tied pair either may be bound; then the other is bound by it.
    while bound := {leaf.name: why for leaf in chosen if (why := draft.is_bound(leaf))}:
        chosen = [leaf for leaf in chosen if leaf.name not in bound]
        draft.whole |= bound
        for name in bound:
            del draft.roles[name]
    for leaf in chosen:
        draft.split_outputs(leaf, even_shares(leaf.num_outputs, tp))


def _is_left_whole(names: set[str], asked: Mapping[str, str]) -> bool:
    """Whether the user wants a group whole.

    Raises:
        UsageError: some of its members, and not all.
    """
    wanted = {name for name in names if asked.get(name) == "whole"}
    if wanted and wanted != names:
        others = ", ".join(sorted(names - wanted))
        raise UsageError(
            f"tensor rule: {min(wanted)} cannot be whole alone: it is split together with {others}",
            hint="give these the same rule",
        )
    return bool(wanted)


def _split_alone(draft: Draft, asked: Mapping[str, str]) -> None:
    """Layers that the graph leaves whole and the user wants split."""
    for name, wanted in asked.items():
        leaf = draft.leaves[name]
        if name in draft.roles or wanted == "whole":
            continue
        if (why := draft.is_bound(leaf)) or (wanted == "vocabulary") == leaf.is_linear:
            why = why or f"it is {'a linear' if leaf.is_linear else 'an embedding'}"
            raise UsageError(f"tensor rule: {name} cannot be {wanted}: {why}")
        if wanted == "row":
            split = Split(-1, even_shares(leaf.num_inputs, draft.tp))
            draft.taken[name] = split
            draft.splits[f"{name}.weight"] = Split(1 - leaf.output_dim, split.shares)
            draft.roles[name] = "scattered"
        else:
            draft.split_outputs(leaf, even_shares(leaf.num_outputs, draft.tp))
            draft.roles[name] = "gathered" if wanted == "column" else "vocabulary"


def _refuse_contradictions(draft: Draft, asked: Mapping[str, str]) -> None:
    meant = {"column": ("column", "gathered"), "row": ("row", "scattered")}
    for name, wanted in asked.items():
        role = draft.roles.get(name)
        if wanted == "whole" or role in meant.get(wanted, ("vocabulary", "gathered")):
            continue
        raise UsageError(
            f"tensor rule: {name} cannot be {wanted}: what it computes makes it {role}",
            hint="leave the rule out",
        )
