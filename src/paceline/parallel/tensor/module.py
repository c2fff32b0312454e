"""A user's own module over the `tp` axis: rules derived, proved by numbers, then applied.

Source: Li et al., Redco, arXiv:2310.16355, Sec. 3.1; Shoeybi et al., arXiv:1909.08053, Sec. 3.
Replaces: tables for each architecture.  Needs: mesh.tp > 1.
Forbids: dropout in training, tensor.sequence_parallel.
Cost: two all-reduces of the activations for each attention and each feed-forward, one for the
    embedding, one all-gather for the head.
Differs: a rule is not trusted. Every rank runs its part of the module once on a few tokens, and
    the parts must sum up to what the whole module gives, or nothing is split.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from paceline.core.errors import UsageError
from paceline.dist.world import World
from paceline.models.trace import Trace, mode_of, trace
from paceline.parallel.tensor.attributes import changes, set_attributes
from paceline.parallel.tensor.border import Probe, Ranks
from paceline.parallel.tensor.boundary import AXIS, PURPOSE
from paceline.parallel.tensor.roles import local_part, make_roles
from paceline.plan.derive_rules import derive
from paceline.plan.module_graph import Leaf
from paceline.plan.module_rules import Group, Rules

_OUTPUT_SIZES = ("out_features", "num_embeddings", "nf")
_INPUT_SIZES = ("in_features", "nx")


@dataclass(frozen=True, slots=True)
class Sample:
    """A small call of a module.

    Attributes:
        call: makes it.
        tokens_BT: what it is called on.
    """

    call: Callable[[], Any]
    tokens_BT: Tensor


def split_module(
    module: nn.Module, world: World, sample: Sample, overrides: Mapping[str, str] | None = None
) -> Rules:
    """Splits a module in place over the tensor ranks, all of which call this alike.

    Args:
        module: the same on all ranks of the axis.
        world: the ranks.
        sample: a call of it, the same on all ranks.
        overrides: see `paceline.plan.derive_rules.derive`.

    Returns:
        What is split how, and what is left whole and why.

    Raises:
        ConfigError: heads that the ranks do not divide.
        UsageError: dropout in training; nothing can be split; or parts that do not sum up to the
            whole. Then the module is as it was.
    """
    rank = world.coordinate(AXIS)
    seen = trace(module, sample.call, sample.tokens_BT)
    if seen.has_dropout:
        _refuse_training(module, ())
    rules = derive(seen.graph, world.degree(AXIS), overrides)
    leaves = {leaf.name: leaf for leaf in seen.graph.leaves}
    claims = _claims(rules, leaves, rank)
    calls = _calls_of(module, claims, sample)
    expected = _expected(module, seen, rules)
    with ExitStack() as undo:
        _slice(module, rules, leaves, rank, undo)
        probe = Probe(expected, rank)
        roles = make_roles(module, leaves, rules, probe, rank)
        for role in roles.values():
            role.layer.forward = role
            undo.callback(role.layer.__dict__.pop, "forward")
        with mode_of(module, is_training=False), torch.no_grad():
            _prove(module, claims, calls, probe, expected, world, undo)
        undo.pop_all()  # it is right: it stays
    border = Ranks(world)
    for role in roles.values():
        role.border = border
    if seen.has_dropout:
        module.register_forward_pre_hook(_refuse_training)
    return rules


def _refuse_training(module: nn.Module, _arguments: Any) -> None:
    """Ranks that draw differently would part: each would drop other features of the same token."""
    if module.training:
        raise UsageError(
            f"{type(module).__name__} drops features at random while it trains, which tensor ranks "
            "would do each in its own way",
            hint="set its dropout rates to 0, or call module.eval(), which gradients do not mind",
        )


@dataclass(frozen=True, slots=True)
class _Claim:
    """What is to be proved: parts of a module sum up to what the whole gives.

    Attributes:
        owner: the module that is called for it.
        closed: its layers at whose output ranks meet.
        counts: of heads, in the whole and in this rank's part.
        widths: of layers, in the whole to those in this rank's part.
    """

    owner: str
    closed: tuple[str, ...]
    counts: Mapping[str, tuple[int, int]]
    widths: Mapping[int, int]


def _claims(rules: Rules, leaves: Mapping[str, Leaf], rank: int) -> list[_Claim]:
    """The innermost first: what is around a module runs only once the module itself does."""
    claims = [_claim(group, rules, leaves, rank) for group in rules.groups]
    alone = ("gathered", "scattered", "vocabulary")
    claims += [_Claim(n, (n,), {}, {}) for n, role in rules.roles.items() if role in alone]
    order = {name: n for n, name in enumerate(leaves)}
    return sorted(claims, key=lambda c: (-len(_path(c.owner)), order[c.closed[0]]))


def _claim(group: Group, rules: Rules, leaves: Mapping[str, Leaf], rank: int) -> _Claim:
    widths = {
        leaves[name].num_outputs: len(rules.splits[f"{name}.weight"].indices(rank))
        for name in group.columns
    }
    widths |= {
        leaves[name].num_inputs: len(rules.splits[f"{name}.weight"].indices(rank))
        for name in group.rows
    }
    names = (*group.columns, *group.rows, *group.taken)
    return _Claim(_owner(names), group.rows, _counts(group, rules.tp), widths)


def _counts(group: Group, tp: int) -> dict[str, tuple[int, int]]:
    if not group.is_heads:
        return {}
    heads = (group.num_parts, group.num_parts // tp)
    keys = (group.num_units, max(1, group.num_units // tp))
    return {"heads": heads, "keys": keys, "group": (heads[0] // keys[0], heads[1] // keys[1])}


def _owner(names: tuple[str, ...]) -> str:
    """The innermost module that has all of some layers."""
    levels = zip(*(_path(name) for name in names), strict=False)
    shared = takewhile(lambda level: len(set(level)) == 1, levels)
    return ".".join(level[0] for level in shared)


def _path(name: str) -> list[str]:
    return name.split(".") if name else []


def _calls_of(
    module: nn.Module, claims: list[_Claim], sample: Sample
) -> dict[str, tuple[Any, Any]]:
    """What each owner is called with, in the whole module."""
    calls: dict[str, tuple[Any, Any]] = {}

    def keeping(owner: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            # A cache in the arguments is changed by the call itself.
            calls.setdefault(owner, copy.deepcopy((args, kwargs)))

        return hook

    with ExitStack() as stack:
        for owner in {claim.owner for claim in claims}:
            part = module.get_submodule(owner)
            hook = part.register_forward_pre_hook(keeping(owner), with_kwargs=True)
            stack.callback(hook.remove)
        with mode_of(module, is_training=False), torch.no_grad():
            sample.call()
    return calls


def _expected(module: nn.Module, seen: Trace, rules: Rules) -> dict[str, Tensor]:
    """What ranks together give at each border: the whole layer's output, before its bias where
    that is added after the sum.
    """
    expected: dict[str, Tensor] = {}
    for name, role in rules.roles.items():
        if name in seen.outputs:
            expected[name] = seen.outputs[name]
            bias = getattr(module.get_submodule(name), "bias", None)
            if role in ("row", "scattered") and isinstance(bias, Tensor):
                expected[name] = expected[name] - bias.detach()
    return expected


def _slice(
    module: nn.Module, rules: Rules, leaves: Mapping[str, Leaf], rank: int, undo: ExitStack
) -> None:
    """Puts this rank's parts in the place of parameters; tied ones stay tied."""
    parts: dict[int, nn.Parameter] = {}
    for name, split in rules.splits.items():
        layer_name, _, kind = name.rpartition(".")
        layer = module.get_submodule(layer_name)
        whole = layer.get_parameter(kind)
        if id(whole) not in parts:
            local = local_part(whole, split, rank)
            parts[id(whole)] = nn.Parameter(local, requires_grad=whole.requires_grad)
        setattr(layer, kind, parts[id(whole)])
        undo.callback(setattr, layer, kind, whole)
        if kind == "weight":
            values = _sizes(layer, leaves[layer_name], split.dim, split.indices(rank))
            undo.callback(set_attributes(layer, values))


def _sizes(
    layer: nn.Module, leaf: Leaf, dim: int | None, indices: list[int]
) -> dict[str, int | None]:
    """What a layer says of its own size."""
    names = _OUTPUT_SIZES if dim == leaf.output_dim else _INPUT_SIZES
    values: dict[str, int | None] = {n: len(indices) for n in names if hasattr(layer, n)}
    padding = getattr(layer, "padding_idx", None)
    if leaf.kind == "embedding" and padding is not None:
        values["padding_idx"] = indices.index(padding) if padding in indices else None
    return values


def _prove(
    module: nn.Module,
    claims: list[_Claim],
    calls: Mapping[str, tuple[Any, Any]],
    probe: Probe,
    expected: Mapping[str, Tensor],
    world: World,
    undo: ExitStack,
) -> None:
    """Proves every claim, or raises; sets the counts with which modules run on a part."""
    for claim in claims:
        owner = module.get_submodule(claim.owner)
        reasons: list[str] = []
        for values in changes(owner, claim.counts, claim.widths):
            set_back = set_attributes(owner, values)
            reasons.append(_difference(owner, claim, calls[claim.owner], probe, expected, world))
            if not reasons[-1]:
                undo.callback(set_back)
                break
            set_back()
        else:
            raise UsageError(
                f"{claim.owner or type(module).__name__} cannot be split over {world.degree(AXIS)} "
                f"tensor ranks at {' and '.join(claim.closed)}: {reasons[0]}",
                hint=f"tensor_rules={{{_pattern(claim.owner)!r}: 'whole'}} leaves it whole",
            )


def _pattern(owner: str) -> str:
    """What matches the layers of a module, and of all blocks like it."""
    return ".".join(["*" if name.isdigit() else name for name in _path(owner)] + ["*"])


def _difference(
    owner: nn.Module,
    claim: _Claim,
    call: tuple[Any, Any],
    probe: Probe,
    expected: Mapping[str, Tensor],
    world: World,
) -> str:
    """How what the ranks' parts sum up to differs from the whole; nothing if it does not."""
    probe.partial.clear()
    why = ""
    args, kwargs = copy.deepcopy(call)
    try:
        owner(*args, **kwargs)
    except Exception as error:  # whatever a module raises where it meets a shape it did not expect
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    is_run = all(
        name in probe.partial and probe.partial[name].shape == expected[name].shape
        for name in claim.closed
    )
    failed = torch.tensor(float(not is_run), device=world.device)
    if world.sum(failed, (AXIS,), purpose=PURPOSE).item():
        return why or "it gives another shape, or other ranks cannot run it"
    for name in claim.closed:
        total = world.sum(probe.partial[name].clone(), (AXIS,), purpose=PURPOSE)
        largest = float(expected[name].abs().max())
        error = float((total - expected[name]).abs().max())
        if not error <= largest * torch.finfo(total.dtype).eps ** 0.5:
            return f"its parts sum up to something else, by {error / largest:.0e} of the whole"
    return ""
