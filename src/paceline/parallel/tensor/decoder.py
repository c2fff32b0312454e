"""A decoder split over the `tp` axis: matrices by heads, hidden columns and words.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, Sec. 3; Korthikanti et al., Reducing
    Activation Recomputation, arXiv:2205.05198, Sec. 4.2 (norms and residuals split over tokens).
Replaces: nothing.  Needs: mesh.tp > 1, at most as many ranks as query heads.
Forbids: peft, train.compile.
Cost: weights / tp a rank, but for norms, routers, experts and biases behind a sum. With A the bytes
    of a micro-batch's hidden states, a layer costs, forward and backward together, 4 A in
    all-reduces without sequence parallelism, and with it 4 A in all-gathers and 4 A in
    reduce-scatters (a ring sends as much for both).
Differs: shares need not be equal: heads, columns and words go round as evenly as they can. A key
    head is copied to every rank whose query heads read it. Tokens are split as rows of the whole
    batch, padded to a multiple of tp.

Traffic, of the tensors that a rank gives to all-reduces and reduce-scatters and gets from
all-gathers. Of a micro-batch with B T tokens, C of which have a label, where every parameter is
trained and n is the number of attentions and feed-forwards (two a layer; where it has experts, one,
and one more if all tokens share something beside them):

- with sequence parallelism, (2 n + 2) A in all-gathers and as much in reduce-scatters, A being of
  tp ceil(B T / tp) rows: forward and backward of each of the n, and of both ends of the model;
- without it, (2 n + 2) A in all-reduces, A being of B T rows;
- 3 C numbers of the softmax's dtype in all-reduces, for the loss;
- where one norm goes over all heads, 4 B T numbers a layer in all-reduces;
- where blocks are computed again, their forward part once more, but for the sum at a block's end
  where no norm follows it: nothing in the backward pass needs that.

Of a step, the gradients of `SplitDecoder.partial`, and those of `SplitDecoder.copied` as whole
ones, in all-reduces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from paceline.dist.world import World
from paceline.models.attention import Attention
from paceline.models.decoder import Decoder
from paceline.models.ffn import FeedForward
from paceline.models.ladder import LadderBlock
from paceline.models.layout import Layout
from paceline.models.linear import Linear, Product, RMSNorm
from paceline.optim.parts import Part
from paceline.parallel.buckets import in_groups, sum_in_buckets
from paceline.parallel.cut import cut_parameter
from paceline.parallel.tensor.boundary import (
    AXIS,
    copy_in,
    gather_rows,
    scatter_rows,
    sum_up,
)
from paceline.parallel.tensor.ladder import OverlappedSums, leave_term
from paceline.parallel.tensor.norm import SplitRMSNorm
from paceline.parallel.tensor.vocabulary import SplitVocabulary, as_tokens
from paceline.plan.layout import Box, Place
from paceline.plan.model_spec import ModelSpec
from paceline.plan.tensor_rules import HeadShare, Split, decoder_rules, head_share

GRADIENTS = "tensor parallel gradients"


@dataclass(frozen=True, slots=True)
class SplitDecoder:
    """What is known of a decoder once it is split.

    Attributes:
        places: where this rank's parameters lie in the whole ones.
        partial: whole parameters of which a rank's gradient is one term of the sum over ranks.
        copied: parameters of which neighbours have rows in common.
        world: the ranks.
    """

    places: Mapping[str, Place]
    partial: frozenset[str]
    copied: frozenset[str]
    world: World

    def without(self, names: frozenset[str]) -> SplitDecoder:
        """The same, but for parameters whose gradients are summed elsewhere."""
        return replace(self, partial=self.partial - names)

    def finish_gradients(self, parts: Mapping[str, Part], spread_axes: tuple[str, ...]) -> None:
        """Makes terms of gradients to sums.

        Args:
            parts: of this rank, their gradients summed over data ranks.
            spread_axes: over which data ranks have spread them.

        Comm: an all-reduce over tp of the partial gradients, and one of the copied parameters'
            whole gradients over tp and the spread axes.
        """
        partial_parts = [parts[name].ensured_gradient() for name in self._held(self.partial, parts)]
        sum_in_buckets(partial_parts, self.world, (AXIS,), purpose=GRADIENTS)
        axes = (*spread_axes, AXIS)
        copied = self._held(self.copied, parts)
        # A group at a time: few whole gradients are there together.
        for names in in_groups(copied, lambda name: _whole_bytes(parts[name])):
            wholes = [_in_whole(parts[name]) for name in names]
            sum_in_buckets(wholes, self.world, axes, purpose=GRADIENTS)
            for name, whole in zip(names, wholes, strict=True):
                parts[name].ensured_gradient().copy_(whole[parts[name].place.box.slices])

    def _held(self, names: frozenset[str], parts: Mapping[str, Part]) -> Iterator[str]:
        return (name for name in parts if name in names and parts[name].tensor.requires_grad)


def split(
    model: Decoder, spec: ModelSpec, world: World, *, is_sequence_parallel: bool
) -> SplitDecoder:
    """Leaves a decoder of the meta device this rank's part of its matrices, in place.

    Args:
        model: the whole one, or some blocks of it.
        spec: of the whole model.
        world: the ranks.
        is_sequence_parallel: whether norms and residuals are split over tokens.
    """
    rank, degree = world.coordinate(AXIS), world.degree(AXIS)
    rules = decoder_rules(spec, degree)
    names = [name for name, _ in model.named_parameters()]
    places: dict[str, Place] = {}
    for name in names:
        places[name] = _place(tuple(model.get_parameter(name).shape), rules[name], rank)
        cut_parameter(model, name, places[name])
    heads = head_share(spec.num_heads, spec.num_kv_heads, degree, rank)
    in_ladder: set[nn.Module] = set()
    for module in list(model.modules()):  # a block before its parts
        if isinstance(module, LadderBlock):
            module.overlap = OverlappedSums(world)
            in_ladder |= {module.attention, module.ffn}
        elif isinstance(module, Attention):
            _split_heads(module, heads, world)
            if module in in_ladder:
                leave_term(module.output, world)
            else:
                _cross_attention(module, world, is_sequence_parallel)
        elif isinstance(module, FeedForward):
            if module in in_ladder:
                leave_term(module.down, world)
            else:
                _cross_ffn(module, world, is_sequence_parallel)
    model.vocabulary = SplitVocabulary(
        spec.vocab_size, world, is_sequence_parallel=is_sequence_parallel
    )
    whole = {name for name in names if rules[name].dim is None}
    partial_names = {name for name in whole if _has_term(name, spec)}
    return SplitDecoder(
        places=places,
        partial=frozenset(whole if is_sequence_parallel else partial_names),
        copied=frozenset(name for name in names if rules[name].copied),
        world=world,
    )


def _place(shape: tuple[int, ...], rule: Split, rank: int) -> Place:
    whole = Place.of_whole(shape)
    if rule.dim is None:
        return whole if rank == 0 else whole.disowned()
    (own,) = rule.shares[rank]
    taken = max((share.stop for of_rank in rule.shares[:rank] for share in of_rank), default=0)
    owned = range(max(own.start, taken), own.stop)
    box = Box.of_whole(shape)
    return replace(whole, box=box.narrowed(rule.dim, own), owned=box.narrowed(rule.dim, owned))


def _has_term(name: str, spec: ModelSpec) -> bool:
    """Whether a rank's gradient of a whole parameter is a term, where tokens are not split."""
    if ".query_norm." in name or ".key_norm." in name:
        return True
    top, *rest = name.split(".")
    return top == "blocks" and spec.is_ladder(int(rest[0]))


def _split_heads(attention: Attention, heads: HeadShare, world: World) -> None:
    if not heads.is_grouped:
        attention.key_of_query = heads.key_of_query
    if attention.qk_norm == "all":
        head_dim = attention.head_dim
        for name, own, owned in (
            ("query_norm", heads.query, heads.query),
            ("key_norm", heads.key, heads.owned_key),
        ):
            whole = getattr(attention, name)
            assert isinstance(whole, RMSNorm), "paceline.plan.check admits no other"
            columns, mine = _times(own, head_dim), _times(owned, head_dim)
            setattr(attention, name, SplitRMSNorm(whole, columns, mine, world))


def _cross_attention(attention: Attention, world: World, is_sequence_parallel: bool) -> None:
    enter = partial(_enter_attention, world=world, is_sequence_parallel=is_sequence_parallel)
    attention.register_forward_pre_hook(enter)
    _sum_behind(attention.output, world, is_sequence_parallel)


def _times(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _cross_ffn(ffn: FeedForward, world: World, is_sequence_parallel: bool) -> None:
    enter = gather_rows if is_sequence_parallel else copy_in
    ffn.register_forward_pre_hook(lambda _ffn, inputs: (enter(inputs[0], world),))
    _sum_behind(ffn.down, world, is_sequence_parallel)


def _enter_attention(
    _attention: nn.Module, inputs: tuple[Any, ...], *, world: World, is_sequence_parallel: bool
) -> tuple[Any, ...]:
    x_BTD, layout, *others = inputs
    assert isinstance(layout, Layout)
    if is_sequence_parallel:
        return as_tokens(gather_rows(x_BTD, world), layout), layout, *others
    return copy_in(x_BTD, world), layout, *others


def _sum_behind(linear: Linear, world: World, is_sequence_parallel: bool) -> None:
    """Sums the products of a matrix that is split by its inputs; its bias is added once."""
    multiply: Product = linear.product
    leave: Callable[[Tensor, World], Tensor] = scatter_rows if is_sequence_parallel else sum_up

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = leave(multiply(x, weight, None), world)
        return y if bias is None else y + bias.to(y.dtype)

    linear.product = product


def _whole_bytes(part: Part) -> int:
    return math.prod(part.place.shape) * part.tensor.itemsize


def _in_whole(part: Part) -> Tensor:
    """The part's gradient in a whole one that is zero elsewhere."""
    gradient = part.ensured_gradient()
    whole = gradient.new_zeros(part.place.shape)
    whole[part.place.box.slices] = gradient
    return whole
