"""What dimensions of a decoder's parameters stand for, and what is stacked in them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.plan.layout import Box
from paceline.plan.model_spec import ModelSpec
from paceline.plan.tensor_rules import decoder_rules

_AXES = {  # by the end of a parameter's name; the first that fits counts
    "embedding.weight": ("words", "model"),
    "head.weight": ("words", "model"),
    "attention.query.weight": ("query heads", "model"),
    "attention.key.weight": ("key heads", "model"),
    "attention.value.weight": ("key heads", "model"),
    "attention.output.weight": ("model", "query heads"),
    "attention.query.bias": ("query heads",),
    "attention.key.bias": ("key heads",),
    "attention.value.bias": ("key heads",),
    "router.weight": ("experts", "model"),
    "expert_scales": ("experts",),
    "experts.gate": ("experts", "hidden", "model"),
    "experts.up": ("experts", "hidden", "model"),
    "experts.down": ("experts", "model", "hidden"),
    "shared_gate.weight": ("gate", "model"),
    "gate.weight": ("hidden", "model"),
    "up.weight": ("hidden", "model"),
    "down.weight": ("model", "hidden"),
    "gate.bias": ("hidden",),
    "up.bias": ("hidden",),
    "output.bias": ("model",),
    "down.bias": ("model",),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor within a tensor: one that other layouts may keep on its own.

    Attributes:
        name: within the whole, for example ``expert 3``.
        box: where it lies.
    """

    name: str
    box: Box


@dataclass(frozen=True, slots=True)
class Declared:
    """What is known of a tensor beside its sizes.

    Attributes:
        axes: what each dimension stands for; empty where nobody has said so.
        pieces: the tensors that are stacked or fused in it.
    """

    axes: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()


def declare_decoder(spec: ModelSpec) -> dict[str, Declared]:
    """Every parameter of `paceline.models.decoder.Decoder` to what it is made of.

    A rank's part of a matrix is whole heads, words, hidden columns or experts; nothing is padded to
    make parts equal, so there is no padding to declare.
    """
    return {name: Declared(_axes(name), _pieces(name, spec)) for name in decoder_rules(spec, 1)}


def _axes(name: str) -> tuple[str, ...]:
    if name == "position_embedding.weight":
        return ("positions", "model")
    known = (axes for end, axes in _AXES.items() if name.endswith(end))
    return next(known, ("norm",) if "norm" in name.split(".")[-2] else ())


def _pieces(name: str, spec: ModelSpec) -> tuple[Piece, ...]:
    """The experts of a stack of them."""
    if ".experts." not in name or spec.moe is None:
        return ()
    inner = (spec.moe.d_expert, spec.d_model)
    shape = (spec.moe.num_experts, *(inner[::-1] if name.endswith(".down") else inner))
    whole = Box.of_whole(shape)
    return tuple(Piece(f"expert {n}", whole.narrowed(0, range(n, n + 1))) for n in range(shape[0]))
