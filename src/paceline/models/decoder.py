"""The decoder: embedding, blocks, norm, head. A family is a `ModelSpec` and a table of names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paceline.models.attention import Around, Attend, Attention, attend_within, plainly
from paceline.models.ffn import FeedForward
from paceline.models.ladder import LadderBlock
from paceline.models.layout import Layout
from paceline.models.linear import Linear, make_norm
from paceline.models.moe import MixtureOfExperts, feed
from paceline.models.prelude import Prelude
from paceline.models.rope import rotary_angles
from paceline.models.tied import LookUp, TiedEmbedding
from paceline.models.vocabulary import Head, Output, Vocabulary, WholeVocabulary, logits
from paceline.plan.model_spec import ModelSpec


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        is_normed_before = spec.norm_placement in ("before", "both")
        is_normed_after = spec.norm_placement in ("after", "both")

        def norm(wanted: bool) -> nn.Module:
            return make_norm(spec, spec.d_model) if wanted else nn.Identity()

        self.attention_norm = norm(is_normed_before)
        self.attention = Attention(spec, layer)
        self.attention_post_norm = norm(is_normed_after)
        self.ffn_norm = norm(is_normed_before)
        self.ffn = MixtureOfExperts(spec) if spec.has_experts(layer) else FeedForward(spec)
        self.ffn_post_norm = norm(is_normed_after)

    def forward(
        self, x_BTD: Tensor, layout: Layout, angles: tuple[Tensor, Tensor] | None, attend: Attend
    ) -> Tensor:
        attended_BTD = self.attention(self.attention_norm(x_BTD), layout, angles, attend)
        x_BTD = x_BTD + self.attention_post_norm(attended_BTD)
        return x_BTD + self.ffn_post_norm(feed(self.ffn, self.ffn_norm(x_BTD), layout))


class Absent(nn.Module):
    """In place of a part of the decoder that is elsewhere."""

    def forward(self, *_arguments: object) -> Tensor:
        raise RuntimeError("this part of the model is not here")


class Decoder(nn.Module):
    """A decoder-only transformer.

    Args:
        spec: sizes and flags.

    Attributes:
        compute_dtype: dtype of activations; None is that of the embedding. Weights are cast to
            it as they are used, so it may differ from theirs.
        prelude: virtual tokens before every document, or None.
        vocabulary: how words are looked up and predicted.
        attend: the core of attention where a call gives none; another may reach over ranks.
        around_block: calls every block; another may recompute it in the backward pass.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.compute_dtype: torch.dtype | None = None
        self.prelude: Prelude | None = None
        self.vocabulary: Vocabulary = WholeVocabulary()
        self.attend: Attend = attend_within
        self.around_block: Around = plainly
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        if spec.positions == "learned":
            self.position_embedding = nn.Embedding(spec.max_positions, spec.d_model)
        self.blocks = nn.ModuleList(
            LadderBlock(spec, layer) if spec.is_ladder(layer) else Block(spec, layer)
            for layer in range(spec.num_layers)
        )
        self.norm = make_norm(spec, spec.d_model)
        if not spec.tied_embeddings:
            self.head = Linear(spec.d_model, spec.vocab_size, bias=False)

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens of the prelude; so many positions of the context are taken."""
        return 0 if self.prelude is None else self.prelude.num_tokens

    def forward(
        self,
        tokens_BT: Tensor,
        layout: Layout | None = None,
        *,
        attend: Attend | None = None,
        last_only: bool = False,
        is_begun: bool = False,
        head: Head = logits,
    ) -> Tensor:
        """Logits of the next token at every position, or what another head makes.

        Args:
            tokens_BT: token ids.
            layout: where the tokens stand; by default every row is one document from position 0.
            attend: the core of attention; by default the model's.
            last_only: whether only the last position of each row is wanted.
            is_begun: whether the tokens go on from others that `attend` has kept, the prelude's
                among them; their positions then count the prelude's too.
            head: takes the last hidden states and the projection onto the vocabulary.

        Returns:
            What `head` returns: logits_BTV, or logits_B1V, in the compute dtype.
        """
        place: Layout = layout or Layout.whole_rows(tokens_BT)
        tied = TiedEmbedding(self.embedding.weight) if self.spec.tied_embeddings else None
        x_BTD = self.embed(tokens_BT, tied)
        if self.prelude is not None and not is_begun:
            x_BTD, place, attend = self.prelude(x_BTD, place, attend or self.attend)
        x_BTD = self.through(self.positioned(x_BTD, place), place, range(len(self.blocks)), attend)
        x_BTD = x_BTD[:, -1:] if last_only else x_BTD[:, place.num_shared :]
        return self.predict(x_BTD, place, head, tied)

    def embed(self, tokens_BT: Tensor, rows: LookUp | None = None) -> Tensor:
        """Embedded tokens, before positions are added.

        Args:
            tokens_BT: token ids.
            rows: what looks them up, where their gradient is not autograd's alone.
        """
        look_up = rows.embed if rows else self.embedding
        return self.vocabulary.embed(tokens_BT, lambda tokens: self._scaled(look_up(tokens)))

    def positioned(self, x_BTD: Tensor, layout: Layout) -> Tensor:
        """Embedded tokens as the first block takes them."""
        if self.spec.positions != "learned":
            return x_BTD
        positions_BTD = self.position_embedding(layout.positions_BT).to(x_BTD.dtype)
        return x_BTD + self.vocabulary.spread(positions_BTD)

    def through(
        self, x_BTD: Tensor, layout: Layout, layers: range, attend: Attend | None = None
    ) -> Tensor:
        """Hidden states after some of the blocks."""
        attend = attend or self.attend
        angles = self._angles(layout, x_BTD.dtype)
        for layer in layers:
            turned = angles[self.spec.window_of(layer) is not None]
            # Between blocks of a ladder it is a `paceline.models.ladder.Stream`.
            x_BTD = self.around_block(self.blocks[layer], x_BTD, layout, turned, attend)
        return x_BTD

    def predict(
        self, x_BTD: Tensor, layout: Layout, head: Head, tied: TiedEmbedding | None = None
    ) -> Tensor:
        """What a head makes of the hidden states after the last block."""
        x_BTD = self.vocabulary.collect(self.norm(x_BTD), layout)
        return head(x_BTD, Output(self.vocabulary, tied.head() if tied else self.head_weight))

    @property
    def head_weight(self) -> Tensor:
        """The weight of the output head, (V, D)."""
        return self.embedding.weight if self.spec.tied_embeddings else self.head.weight

    def _scaled(self, x_BTD: Tensor) -> Tensor:
        """Embeddings in the compute dtype, as the first block takes them."""
        x_BTD = x_BTD.to(self.compute_dtype or x_BTD.dtype)
        if self.spec.embedding_scale != 1.0:
            # The scale itself is rounded to the compute dtype, as it was in training.
            x_BTD = x_BTD * torch.tensor(self.spec.embedding_scale, dtype=x_BTD.dtype)
        return x_BTD

    def _angles(
        self, layout: Layout, dtype: torch.dtype
    ) -> dict[bool, tuple[Tensor, Tensor] | None]:
        """Rotary angles of layers without a window (False) and with one (True)."""
        spec = self.spec
        if spec.positions != "rotary":
            return {False: None, True: None}
        plain = rotary_angles(
            layout.positions_BT,
            head_dim=spec.head_dim,
            theta=spec.rope_theta,
            scaling=spec.rope_scaling,
            dtype=dtype,
        )
        if spec.window_rope_theta is None:
            return {False: plain, True: plain}
        windowed = rotary_angles(
            layout.positions_BT,
            head_dim=spec.head_dim,
            theta=spec.window_rope_theta,
            scaling=None,
            dtype=dtype,
        )
        return {False: plain, True: windowed}
