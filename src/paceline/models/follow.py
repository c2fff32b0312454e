"""How the functions of torch carry provenance from what they read to what they give.

Functions that move elements about move rows with them; element-wise functions join them; products
and norms widen them over what they sum. A function that is not known here is taken to mix
everything: what follows from it is never wrong, at worst it says too little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paceline.models.function_names import plain_name
from paceline.models.provenance import (
    NOTHING,
    Key,
    Provenance,
    Rows,
    everywhere,
    joined_rows,
    tensors_in,
    widened,
)


def follow(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    outputs: list[Tensor],
    known: Callable[[Tensor], Provenance],
) -> list[Provenance]:
    """The provenance of what a function has given.

    Args:
        function: that has been called, by the name that torch gives it.
        arguments: of the call.
        options: of the call.
        outputs: all tensors that it gave.
        known: the provenance of a tensor, empty where there is none.

    Returns:
        One for each output.
    """
    name = plain_name(function)
    call = _Call(function, arguments, options, outputs, known)
    rule = _RULES.get(name)
    found = rule(call) if rule else None
    return found or _mixed(call, name)


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    outputs: list[Tensor]
    known: Callable[[Tensor], Provenance]

    def operands(self) -> Iterator[Tensor]:
        yield from tensors_in(self.arguments)
        yield from tensors_in(self.options)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        if len(self.arguments) > position:
            return self.arguments[position]
        return self.options.get(name, default)


def _mixed(call: _Call, name: str) -> list[Provenance]:
    """Everything made from everything."""
    mixture = everywhere([call.known(tensor) for tensor in call.operands()], name)
    return [joined_rows([mixture], output.shape) or {} for output in call.outputs]


def _elementwise(call: _Call) -> list[Provenance] | None:
    parts = [call.known(tensor) for tensor in call.operands()]
    found = [joined_rows(parts, output.shape) for output in call.outputs]
    return None if any(one is None for one in found) else [one or {} for one in found]


def _extreme(call: _Call) -> list[Provenance] | None:
    """The larger or smaller of two; of one tensor alone it is a reduction."""
    return _elementwise(call) if len(list(call.operands())) == 2 else _reduced(call)


def _same(call: _Call) -> list[Provenance] | None:
    (first, *_) = call.operands()
    return [call.known(first)] if [o.shape for o in call.outputs] == [first.shape] else None


def _moved(call: _Call) -> list[Provenance] | None:
    """The same function, applied to rows: it looks at no values."""
    keys = {key for tensor in call.operands() for key in call.known(tensor)}
    found: list[Provenance] = [{} for _ in call.outputs]
    for key in keys:
        lows = tensors_in(_applied(call, key, is_low=True))
        highs = tensors_in(_applied(call, key, is_low=False))
        through = frozenset[str]().union(
            *(call.known(t)[key].through for t in call.operands() if key in call.known(t))
        )
        for part, low, high in zip(found, lows, highs, strict=True):
            part[key] = Rows(low, high, through)
    return found


def _applied(call: _Call, key: Key, *, is_low: bool) -> Any:
    def rows(tensor: Tensor) -> Tensor:
        if key in (provenance := call.known(tensor)):
            return provenance[key].low if is_low else provenance[key].high
        if not tensor.is_floating_point():
            return tensor  # an index
        return torch.full_like(tensor, NOTHING if is_low else -1, dtype=torch.int32)

    # Rows may lie in memory otherwise than what they belong to: they are copied where needed.
    function = _COPYING.get(plain_name(call.function), call.function)
    return function(*_replaced(call.arguments, rows), **_replaced(dict(call.options), rows))


def _replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _replaced(part, change) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_replaced(part, change) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _padded(call: _Call) -> list[Provenance] | None:
    tensor, pad = call.argument(0, "input"), call.argument(1, "pad")
    if call.argument(2, "mode", "constant") != "constant":
        return None
    pad_rows = torch.nn.functional.pad
    return [
        {
            key: Rows(
                pad_rows(rows.low, pad, value=NOTHING),
                pad_rows(rows.high, pad, value=-1),
                rows.through,
            )
            for key, rows in call.known(tensor).items()
        }
    ]


def _reduced(call: _Call) -> list[Provenance] | None:
    """A function that mixes along the dimensions that it names, kept or not."""
    (tensor, *_), name = call.operands(), plain_name(call.function)
    dims = call.argument(1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or len(call.outputs) != 1:
        return None
    wide = widened(call.known(tensor), tuple(dims), name)
    shape = call.outputs[0].shape
    if len(shape) < tensor.dim():
        gone = sorted(dim % tensor.dim() for dim in dims)
        wide = {
            key: Rows(_without(rows.low, gone), _without(rows.high, gone), rows.through)
            for key, rows in wide.items()
        }
    joined = joined_rows([wide], shape)
    return None if joined is None else [joined]


def _without(rows: Tensor, dims: list[int]) -> Tensor:
    for dim in reversed(dims):
        rows = rows.squeeze(dim)
    return rows


def _normed(call: _Call) -> list[Provenance] | None:
    """Layer norms: over as many dimensions as the shape that they are given has."""
    tensor, shape = call.argument(0, "input"), call.argument(1, "normalized_shape")
    dims = tuple(range(-len(shape), 0))
    provenance = call.known(tensor)
    name = plain_name(call.function)
    joined = joined_rows([provenance, widened(provenance, dims, name)], call.outputs[0].shape)
    return None if joined is None else [joined]


def _projected(call: _Call) -> list[Provenance] | None:
    """A linear layer outside of any module: mixes the last dimension."""
    (tensor, *_) = call.operands()
    wide = widened(call.known(tensor), (-1,), plain_name(call.function))
    others = [call.known(other) for other in list(call.operands())[1:]]
    if any(others):
        return None
    joined = joined_rows([wide], call.outputs[0].shape)
    return None if joined is None else [joined]


def _multiplied(call: _Call) -> list[Provenance] | None:
    """Products of matrices, with a term that is added where there is one."""
    *added, left, right = list(call.operands())[:3]
    if left.dim() < 2 or right.dim() < 2:
        return None
    name = plain_name(call.function)
    parts = [call.known(tensor) for tensor in added]
    parts += [widened(call.known(left), (-1,), name), widened(call.known(right), (-2,), name)]
    joined = joined_rows(parts, call.outputs[0].shape)
    return None if joined is None else [joined]


def _attended(call: _Call) -> list[Provenance] | None:
    """Attention's core; a query's head reads the key head that it shares with its neighbours."""
    queries, keys, values = (call.argument(n, name) for n, name in enumerate(_ATTENTION_INPUTS))
    mask, name = call.argument(3, "attn_mask"), plain_name(call.function)
    if isinstance(mask, Tensor) and call.known(mask):
        return None
    group = queries.shape[-3] // keys.shape[-3]
    parts = [
        widened(call.known(queries), (-1,), name),
        _repeated(widened(call.known(keys), (-2, -1), name), group),
        _repeated(widened(call.known(values), (-2,), name), group),
    ]
    joined = joined_rows(parts, call.outputs[0].shape)
    return None if joined is None else [joined]


def _repeated(provenance: Provenance, group: int) -> Provenance:
    return {
        key: Rows(
            rows.low.repeat_interleave(group, dim=-3),
            rows.high.repeat_interleave(group, dim=-3),
            rows.through,
        )
        for key, rows in provenance.items()
    }


_COPYING: dict[str, Callable[..., Any]] = {
    "view": Tensor.reshape,
    "view_as": Tensor.reshape_as,
}
_ATTENTION_INPUTS = ("query", "key", "value")
_ELEMENTWISE = frozenset(
    """
    add sub rsub mul multiply div divide true_divide pow float_power sqrt rsqrt exp expm1 log log1p
    sigmoid tanh relu relu6 gelu silu mish softplus leaky_relu elu selu hardswish hardsigmoid
    hardtanh logsigmoid threshold clamp clamp_min clamp_max clip minimum maximum abs neg negative
    sin cos erf square reciprocal where masked_fill nan_to_num sign lerp addcmul addcdiv dropout
    """.split()  # noqa: SIM905 (a list of words)
)
_SAME = frozenset(
    """
    to type type_as float double half bfloat16 contiguous clone detach data cpu cuda requires_grad
    """.split()  # noqa: SIM905 (a list of words)
)
_MOVING = frozenset(
    """
    view reshape view_as reshape_as transpose permute swapaxes swapdims movedim moveaxis t T mT
    unsqueeze squeeze expand expand_as broadcast_to flatten unflatten split split_with_sizes chunk
    tensor_split unbind narrow select __getitem__ index_select cat concat concatenate stack hstack
    repeat tile repeat_interleave roll flip gather take_along_dim diagonal
    """.split()  # noqa: SIM905 (a list of words)
)
_REDUCING = frozenset(
    """
    mean sum var std amax amin norm logsumexp softmax log_softmax cumsum normalize
    """.split()  # noqa: SIM905 (a list of words)
)
_RULES: dict[str, Callable[[_Call], list[Provenance] | None]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_MOVING, _moved),
    **dict.fromkeys(_REDUCING, _reduced),
    "max": _extreme,
    "min": _extreme,
    "pad": _padded,
    "layer_norm": _normed,
    "rms_norm": _normed,
    "linear": _projected,
    "matmul": _multiplied,
    "bmm": _multiplied,
    "baddbmm": _multiplied,
    "addmm": _multiplied,
    "scaled_dot_product_attention": _attended,
}
"""Function to how rows follow through it; what it does not fit counts as unknown."""
