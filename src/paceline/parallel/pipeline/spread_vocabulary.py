"""Embedding and head spread by words over all ranks of a pipeline, their work in passes of its own.

Source: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, arXiv:2411.05288:
    Algorithm 1 where `pipeline.vocabulary_barriers` is 2, Algorithm 2 where it is 1; where passes
    go: `paceline.parallel.pipeline.vocabulary_passes`.
Replaces: edges, where the first stage has the embedding and the last the head.
Needs: mesh.pp > 1, at most as many ranks as words.  Forbids: mesh.tp > 1; peft.
Cost: each rank has vocab_size / pp rows of embedding and head, which are one matrix where they are
    tied, and as much of their work; besides, one more micro-batch's activations under way for each
    barrier, and the exponentials of at most two micro-batches' logits of a rank's words.
Differs: rows of the embedding come from whom has them, and none is summed; what is sent goes from
    rank to rank, not by collectives; with one barrier the labels' rows of the head go beside a
    term, since it is the last stage that scales it, and not its sender. A tied matrix's two
    gradients are added up in the order of the schedule, so its last bits differ between schedules.

Traffic of a micro-batch with N tokens, C of which have a label, on p ranks; W is the bytes of one
number in the dtype of compute, S in that of the softmax, D the model's width. A rank that has n of
the tokens' words and c of the labels' sends

- n D W of embedded rows, unless it has the first stage, whose rank sends each as much back;
- 3 (p - 1) C S of statistics;
- C D W of a term, and with one barrier c D W of labels' rows, unless it has the last stage, whose
  rank sends (p - 1) N D W of hidden states.

An evaluation sends neither terms nor gradients.
"""

from __future__ import annotations

from torch import Tensor

from paceline.dist.p2p import PointToPoint
from paceline.parallel.pipeline.spread_embedding import SpreadEmbedding
from paceline.parallel.pipeline.spread_head import SpreadHead


class SpreadEnds:
    """Both ends of a model as passes of every rank: a `paceline.parallel.pipeline.runtime.Ends`.

    Args:
        embedding: its passes on this rank.
        head: its passes on this rank.
        peers: the other ranks, for what these send.
    """

    def __init__(self, embedding: SpreadEmbedding, head: SpreadHead, peers: PointToPoint) -> None:
        self._embedding, self._head, self._peers = embedding, head, peers
        self.handlers = {**embedding.handlers, **head.handlers}

    def first_input(self, microbatch: int) -> Tensor:
        return self._embedding.join(microbatch)

    def take_first_gradient(self, microbatch: int, gradient: Tensor) -> None:
        self._embedding.deal(microbatch, gradient)

    def take_last_output(self, microbatch: int, y: Tensor) -> None:
        self._head.take_hidden(microbatch, y)

    def last_gradient(self, microbatch: int) -> Tensor:
        return self._head.hidden_gradient(microbatch)

    def finish(self) -> None:
        self._peers.finish()
        self._embedding.finish()
        self._head.finish()
