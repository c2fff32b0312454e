"""The plan: how a job runs, as one frozen object that round-trips to TOML.

Every key is described in docs/contract.md. Absent tables and keys mean the defaults below.
A plan that parses is well formed; whether it can run is for `paceline.plan.check` to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from paceline.core.config import Config, TextTable
from paceline.plan.mesh import MeshConfig

DtypeName = Literal["float64", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroConfig(Config):
    """How the `dp_shard` ranks share state.

    Attributes:
        stage: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
            Absent: 3 where ``mesh.dp_shard > 1``, else 0 (`Plan.zero_stage`).
        sharder: what splits parameters in stage 3: torch's ``fully_shard``, or our own, which
            goes with pipelines. ``auto`` is torch's where ``mesh.pp = 1``, else our own.
    """

    stage: Literal[0, 1, 2, 3] | None = None
    sharder: Literal["auto", "torch", "own"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorConfig(Config):
    """Tensor parallelism: whether norms and residuals are split over the sequence."""

    sequence_parallel: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig(Config):
    """Pipeline parallelism and micro-batches.

    Attributes:
        schedule: the order of forward and backward passes.
        num_microbatches: micro-batches a step on each data rank. Absent: as few as
            `train.microbatch_tokens` admits.
        stages_per_rank: virtual stages on each rank.
        stage_cuts: index of the first block of every stage but the first. Absent: even FLOPs.
        vocabulary: embedding and head on the edge stages, or spread over all of them.
        vocabulary_barriers: how often a micro-batch waits for all ranks where it is spread: with
            2 the gradient of hidden states is made from all ranks' statistics, with 1 from each
            rank's own, and scaled later. Each holds one more micro-batch's activations.
    """

    schedule: Literal[
        "gpipe", "one-f-one-b", "interleaved", "zero-bubble", "zero-bubble-v", "v-half"
    ] = "one-f-one-b"
    num_microbatches: int | None = None
    stages_per_rank: int = 1
    stage_cuts: tuple[int, ...] | None = None
    vocabulary: Literal["edges", "spread"] = "edges"
    vocabulary_barriers: Literal[1, 2] = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextConfig(Config):
    """How attention runs over a sequence that is split over `cp`.

    Attributes:
        method: what ranks send each other.
        ulysses_degree: with ``ulysses-ring``, ranks that exchange heads; those that have the same
            heads form a ring. Absent: the largest d that divides cp with d * d <= cp.
    """

    method: Literal["ring", "zigzag-ring", "ulysses", "ulysses-ring", "token-ring"] = "zigzag-ring"
    ulysses_degree: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig(Config):
    """How tokens reach experts that are split over `ep`."""

    dispatch: str = "all-to-all"
    balance_loss_weight: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig(Config):
    """What is recomputed instead of kept."""

    remat: Literal["none", "selective", "full", "full-keep-attention"] = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig(Config):
    """Number formats of training.

    Attributes:
        params: master parameters and optimizer state.
        compute: activations and matrix products; ``auto`` is bfloat16 where the device
            multiplies it natively, else float32.
        reduce: sums of gradients over ranks and micro-batches.
    """

    params: DtypeName = "float32"
    compute: Literal["float64", "float32", "bfloat16", "auto"] = "float32"
    reduce: DtypeName = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicasConfig(Config):
    """How replicas come to agree."""

    method: str = "all-reduce"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Config):
    """What a step reads.

    Attributes:
        sequence_length: tokens of one sequence.
        tokens_per_step: tokens of one optimizer step over all ranks; accumulation follows.
        seed: of the order of data, and of initialisation.
        pack: whether documents share sequences; attention stays inside each document. Texts are
            laid end to end and cut at the ends of sequences, chats and prompts with completions
            are kept whole. Without it every document has sequences of its own, padded at the end.
        microbatch_tokens: upper bound on the tokens of one micro-batch (but at least one
            sequence), unless `pipeline.num_microbatches` is given.
        freeze: shell-style patterns of parameter names that are not trained.
        answers_only: whether of chats and of prompts with completions only the answers have a
            loss.
        long_documents: what becomes of a document longer than a sequence: cut into several
            (``split``), left out (``drop``) or an error that names it (``refuse``). ``auto`` splits
            text and refuses chats and prompts with completions, which make no sense in parts.
        eval_interval_steps: steps between evaluations on held-out data, if there is any; the first
            is before the first step, the last after the last.
        eval_tokens: upper bound on the tokens of one evaluation (but at least one sequence); the
            same ones every time, whatever the layout.
        compile: whether blocks are compiled, which fuses their element-wise operations: ``auto``
            does so on a GPU. On a CPU it takes half a minute to begin with and gains little.
    """

    sequence_length: int = 512
    tokens_per_step: int = 4096
    seed: int = 0
    pack: bool = True
    microbatch_tokens: int = 2048
    freeze: tuple[str, ...] = ()
    answers_only: bool = True
    long_documents: Literal["auto", "split", "drop", "refuse"] = "auto"
    eval_interval_steps: int = 100
    eval_tokens: int = 16384
    compile: Literal["auto", "on", "off"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig(Config):
    """Parameter-efficient fine-tuning: a few new parameters are trained, the model's own are not.

    Attributes:
        method: what is added; ``none`` trains the model itself.
        targets: shell-style patterns of the modules that are adapted. Absent: the method's usual.
        rank: of the updates of ``lora`` and ``dora``.
        alpha: these updates are scaled by ``alpha / rank``.
        virtual_tokens: that ``prefix`` and ``prompt`` put before every document.
        width: of the hidden layer of ``bottleneck``.
    """

    method: str = "none"
    targets: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0
    virtual_tokens: int = 16
    width: int = 64

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that the method puts before every document."""
        return self.virtual_tokens if self.method in ("prefix", "prompt") else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Config):
    """The learning rate over the steps of a run.

    Attributes:
        kind: the shape of the decay after the warm-up.
        warmup_steps: steps of linear rise from 0.
        final_fraction: learning rate of the last step, as a fraction of `optimizer.lr`.
    """

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Config):
    """The optimizer. Weight decay applies to matrices, not to vectors.

    Attributes:
        clip_norm: upper bound on the norm of the whole gradient; 0 for none.
    """

    name: str = "adamw"
    lr: float = 3e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Config):
    """When and how a run is saved.

    Attributes:
        method: ``lazy`` copies the state while the next step computes and writes in the background,
            ``blocking`` lets the trainer wait.
        interval_steps: steps between saves; the last step is always saved. ``auto`` keeps what
            saves cost below `overhead_share`.
        overhead_share: share of run time that ``interval_steps = "auto"`` may cost.
        keep: how many of the newest checkpoints are kept; 0 for all.
        keep_every: checkpoints of steps that it divides are kept too, whatever their age; 0 for
            none.
        levels: where checkpoints go, fastest first: ``memory`` (of the machine, which outlives
            the run's processes), ``disk`` (the run's folder), or another folder.
        buffer_bytes: host memory of a rank that a lazy save may fill; 0 for what the state needs.
        on_error: whether training goes on when a save fails.
    """

    method: Literal["lazy", "blocking"] = "lazy"
    interval_steps: int | Literal["auto"] = 100
    overhead_share: float = 0.02
    keep: int = 0
    keep_every: int = 0
    levels: tuple[str, ...] = ("disk",)
    buffer_bytes: int = 0
    on_error: Literal["stop", "continue"] = "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResilienceConfig(Config):
    """What happens when a rank fails, hangs or is slow.

    Attributes:
        watch: whether every rank leaves the times of its collectives where a watcher reads them.
        patience: a rank that others wait for is taken to hang after the median step time plus this
            many deviations.
        on_failure: ``stop`` ends the run, ``restart`` starts it again from the newest complete
            checkpoint, ``shrink`` does so without the rank that failed.
        max_restarts: how often; a failure that comes again and again in the same way ends the run
            before.
        shrink_plans: plan files of smaller layouts, tried in this order; none: data ranks are
            taken away, then the other axes.
    """

    watch: bool = False
    patience: float = 20.0
    on_failure: Literal["stop", "restart", "shrink"] = "stop"
    max_restarts: int = 0
    shrink_plans: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeMeshConfig(Config):
    """The layout of a serving engine.

    Attributes:
        tp: ranks that share each matrix.
        pp: stages, which work at different steps at a time.
        ep: ranks that share the experts.
        replicas: of all that.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    replicas: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsConfig(Config):
    """What a server takes on, and from whom: no client may keep the others from being served.

    Attributes:
        max_queued_requests: that wait to be computed; beyond, a request is told to come later.
        max_queued_tokens: of the prompts of these, where there is more than one.
        max_requests_per_key: that one API key may have open at a time.
        max_connections: open at a time.
        max_body_bytes: of a request.
        max_header_bytes: of a request's line and headers.
        max_headers: how many of them.
        receive_timeout_s: in which a request has come whole, from its connection's beginning or
            the last answer's end.
        request_timeout_s: in which it is answered; what is not done by then is ended.
        max_unread_bytes: of an answer that wait for a client to read them.
        unread_timeout_s: for which more than these may wait; then the client is cut off.
        drain_timeout_s: that open answers have to end in once the server is told to stop.
    """

    max_queued_requests: int = 1024
    max_queued_tokens: int = 262144
    max_requests_per_key: int = 256
    max_connections: int = 2048
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 32 << 10
    max_headers: int = 100
    receive_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    max_unread_bytes: int = 64 << 10
    unread_timeout_s: float = 30.0
    drain_timeout_s: float = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(Config):
    """How requests are served.

    Attributes:
        policy: which request gets how many tokens of a step.
        max_batch_tokens: tokens computed in one step, over all requests.
        max_sequences: sequences that may hold keys and values at a time.
        kv_memory_bytes: memory for keys and values, of all ranks together. Absent: 1 GiB, or what
            one whole context needs, if that is more; never more than `max_sequences` whole contexts
            need.
        dtype: weights, activations and caches; ``auto`` as in `PrecisionConfig`.
        weights: ``auto`` is `dtype`.
        batch_invariant: whether logits must not depend on what else is in the batch.
        draft: what proposes tokens ahead of the model.
        adapters: name to the folder of an adapter; all of them are served beside the model, each to
            the requests that name it.
        mesh: serving's own layout.
        limits: what the server takes on.
    """

    policy: str = "stall-free"
    max_batch_tokens: int = 512
    max_sequences: int = 64
    kv_memory_bytes: int | None = None
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    weights: Literal["auto", "int8"] = "auto"
    batch_invariant: bool = False
    draft: str = "none"
    adapters: TextTable = field(default_factory=TextTable)
    mesh: ServeMeshConfig = field(default_factory=ServeMeshConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Config):
    """How a job runs: the one object that `verify`, `train` and `serve` read."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    tensor: TensorConfig = field(default_factory=TensorConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    @property
    def ulysses_degree(self) -> int:
        """How many of the `cp` ranks exchange heads."""
        cp, degree = self.mesh.cp, self.context.ulysses_degree
        if self.context.method != "ulysses-ring":
            return cp if self.context.method == "ulysses" else 1
        return degree or max(d for d in range(1, cp + 1) if cp % d == 0 and d * d <= cp)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage in force."""
        if self.zero.stage is not None:
            return self.zero.stage
        return 3 if self.mesh.dp_shard > 1 else 0

    @property
    def zero_technique(self) -> str:
        """The ZeRO stage in force, as the table of its implementations names it."""
        sharder = self.zero.sharder
        if sharder == "auto":
            sharder = "torch" if self.mesh.pp == 1 else "own"
        return "3-own" if self.zero_stage == 3 and sharder == "own" else str(self.zero_stage)
