"""How a model's parameters are split over tensor-parallel ranks. Pure arithmetic, no torch.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, Sec. 3 (a matrix split by columns of its
    output, then one split by rows of its input, and one sum after both).
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.plan.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The attention heads of one rank.

    Attributes:
        query: its query heads.
        key: key and value heads that these read; neighbours may have some of them too.
        owned_key: of these, the ones that no lower rank has; it stands for them.
        key_of_query: for each of its query heads, which of its key heads it reads.
    """

    query: range
    key: range
    owned_key: range
    key_of_query: tuple[int, ...]

    @property
    def is_grouped(self) -> bool:
        """Whether each key head is read by as many query heads, in order."""
        group, left = divmod(len(self.query), len(self.key))
        in_groups = tuple(head // group for head in range(len(self.query))) if group else ()
        return not left and self.key_of_query == in_groups


def even_share(size: int, tp: int, rank: int) -> range:
    """Which of `size` things a rank has; shares are neighbours and differ by one at most."""
    return range(rank * size // tp, (rank + 1) * size // tp)


def head_share(num_heads: int, num_kv_heads: int, tp: int, rank: int) -> HeadShare:
    """The heads of a rank; every rank has one at least.

    Raises:
        ValueError: more ranks than query heads, or key heads that do not divide the query heads.
    """
    if not 0 <= rank < tp <= num_heads or num_heads % num_kv_heads:
        heads = f"{num_heads} query heads and {num_kv_heads} key heads"
        raise ValueError(f"{heads} have no share for rank {rank} of {tp}")
    group = num_heads // num_kv_heads
    query = even_share(num_heads, tp, rank)
    key = _keys_of(query, group)
    taken = _keys_of(even_share(num_heads, tp, rank - 1), group).stop if rank else 0
    key_of_query = tuple(head // group - key.start for head in query)
    return HeadShare(query, key, range(max(key.start, taken), key.stop), key_of_query)


def _keys_of(query: range, group: int) -> range:
    return range(query.start // group, -(-query.stop // group))


@dataclass(frozen=True, slots=True)
class Split:
    """Which part of a parameter each rank has.

    Attributes:
        dim: the dimension that is split; None: every rank has the whole parameter.
        shares: for each rank its ranges along `dim`, in order. Ranges of several ranks may
            overlap: what they share is copied, and its gradients are summed.
    """

    dim: int | None = None
    shares: tuple[tuple[range, ...], ...] = ()

    def indices(self, rank: int) -> list[int]:
        """The positions along `dim` that a rank has."""
        return [index for part in self.shares[rank] for index in part]

    @property
    def copied(self) -> frozenset[int]:
        """Positions along `dim` that more than one rank has."""
        parts = (part for share in self.shares for part in share)
        copied: set[int] = set()
        furthest = 0  # where the parts before end; all of it from the start of the next is had
        for part in sorted(parts, key=lambda part: part.start):
            copied.update(range(part.start, min(part.stop, furthest)))
            furthest = max(furthest, part.stop)
        return frozenset(copied)


WHOLE = Split()


def decoder_rules(spec: ModelSpec, tp: int) -> dict[str, Split]:
    """Every parameter of `paceline.models.decoder.Decoder` to its split over `tp` ranks.

    Queries, keys, values, gate and up are split by rows, that is by their outputs; the output
    projection and down by columns, their inputs; embedding and head by words. Norms, routers,
    experts, learned positions, and the biases behind a split input are whole.
    """
    words = _rows(spec.vocab_size, tp)
    rules = {"embedding.weight": words}
    if spec.positions == "learned":
        rules["position_embedding.weight"] = WHOLE
    for layer in range(spec.num_layers):
        parts = _attention_rules(spec, tp) | _ffn_rules(spec, layer, tp) | _norm_rules(spec)
        rules |= {f"blocks.{layer}.{name}": split for name, split in parts.items()}
    rules |= _norm("norm", spec)
    if not spec.tied_embeddings:
        rules["head.weight"] = words
    return rules


def _attention_rules(spec: ModelSpec, tp: int) -> dict[str, Split]:
    heads = [head_share(spec.num_heads, spec.num_kv_heads, tp, rank) for rank in range(tp)]
    queries = tuple((_scaled(share.query, spec.head_dim),) for share in heads)
    keys = tuple((_scaled(share.key, spec.head_dim),) for share in heads)
    rules: dict[str, Split] = {}
    for name, shares in (("query", queries), ("key", keys), ("value", keys)):
        rules[f"attention.{name}.weight"] = Split(0, shares)
        if spec.qkv_bias:
            rules[f"attention.{name}.bias"] = Split(0, shares)
    rules["attention.output.weight"] = Split(1, queries)
    if spec.output_bias:
        rules["attention.output.bias"] = WHOLE
    return rules


def _ffn_rules(spec: ModelSpec, layer: int, tp: int) -> dict[str, Split]:
    if spec.moe is None or not spec.has_experts(layer):
        return _hidden_rules("ffn", spec, spec.d_ffn, tp)
    names = ["router.weight", *(f"experts.{part}" for part in ("gate", "up", "down"))]
    names += ["expert_scales"] if spec.moe.expert_scales else []
    names += ["shared_gate.weight"] if spec.moe.shared_gate else []
    shared = _hidden_rules("ffn.shared", spec, spec.moe.d_shared, tp) if spec.moe.d_shared else {}
    return dict.fromkeys((f"ffn.{name}" for name in names), WHOLE) | shared


def _hidden_rules(prefix: str, spec: ModelSpec, width: int, tp: int) -> dict[str, Split]:
    """A feed-forward, by the columns of its hidden layer."""
    hidden = _rows(width, tp)
    rules: dict[str, Split] = {}
    for name in ("gate", "up") if spec.gated_ffn else ("up",):
        rules[f"{prefix}.{name}.weight"] = hidden
        if spec.ffn_bias:
            rules[f"{prefix}.{name}.bias"] = hidden
    rules[f"{prefix}.down.weight"] = Split(1, hidden.shares)
    if spec.ffn_bias:
        rules[f"{prefix}.down.bias"] = WHOLE
    return rules


def _norm_rules(spec: ModelSpec) -> dict[str, Split]:
    names = {
        "before": ("attention_norm", "ffn_norm"),
        "after": ("attention_post_norm", "ffn_post_norm"),
        "both": ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"),
    }[spec.norm_placement]
    if spec.qk_norm != "none":
        names = (*names, "attention.query_norm", "attention.key_norm")
    return {key: split for name in names for key, split in _norm(name, spec).items()}


def _norm(name: str, spec: ModelSpec) -> dict[str, Split]:
    kinds = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    return {f"{name}.{kind}": WHOLE for kind in kinds}


def _rows(size: int, tp: int) -> Split:
    return Split(0, tuple((even_share(size, tp, rank),) for rank in range(tp)))


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
