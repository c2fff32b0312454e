"""A `ModuleGraph` of any module, from one small call of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paceline.models.dropout import DropoutFinder
from paceline.models.follow import follow
from paceline.models.function_names import is_in_place, plain_name
from paceline.models.leaf_kind import leaf_kind
from paceline.models.provenance import (
    WHOLE,
    Provenance,
    mixed_in,
    source_rows,
    tensors_in,
    whole_rows,
    widened,
)
from paceline.models.spans import links_of
from paceline.plan.module_graph import Leaf, LeafKind, Link, ModuleGraph

_MAX_READERS = 8  # a source with more is part of the residual stream


@dataclass(frozen=True, slots=True)
class Trace:
    """What one call has shown.

    Attributes:
        graph: what is made from what.
        outputs: name of a linear or an embedding to what it gave.
        has_dropout: whether something is dropped at random while the module trains.
    """

    graph: ModuleGraph
    outputs: Mapping[str, Tensor]
    has_dropout: bool


@torch.enable_grad()
def trace(module: nn.Module, call: Callable[[], Any], tokens_BT: Tensor) -> Trace:
    """Calls a module once as in evaluation, and once as in training.

    Gradients are on: a tensor with one that has come by no function of torch is known by it.

    Args:
        module: left as it is.
        call: calls it on `tokens_BT`.
        tokens_BT: to know the embedding that looks them up.
    """
    tracer = _Tracer(module, tokens_BT)
    with mode_of(module, is_training=False), tracer.hooks(), tracer:
        output = call()
    with mode_of(module, is_training=True), DropoutFinder() as finder:
        call()
    reached = {source for tensor in tensors_in(output) for source, _ in tracer.known(tensor)}
    graph = ModuleGraph(
        leaves=tuple(seen.leaf() for seen in tracer.seen.values()),
        outputs=frozenset(reached),
        tied=_tied(module),
        direct=frozenset(tracer.direct),
        mixed=frozenset(tracer.mixed()),
    )
    return Trace(graph, tracer.outputs, finder.has_found)


@contextmanager
def mode_of(module: nn.Module, *, is_training: bool) -> Generator[None]:
    """Trains or evaluates for a while; randomness is afterwards what it was."""
    before = {part: part.training for part in module.modules()}
    device = next(module.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        module.train(is_training)
        try:
            yield
        finally:
            for part, was_training in before.items():
                part.training = was_training


def _tied(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(alike) for alike in names.values() if len(alike) > 1)


def leaves_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold parameters and no module that does."""
    for name, part in module.named_modules():
        own = list(part.parameters(recurse=False))
        if own and len(own) == len(list(part.parameters())):
            yield name, part


@dataclass(slots=True)
class _Seen:
    """A leaf, as far as it has been met."""

    name: str
    kind: LeafKind
    shapes: dict[str, tuple[int, ...]]
    links: list[Link]
    reads_tokens: bool = False
    is_passed: bool = False
    num_calls: int = 1

    def leaf(self) -> Leaf:
        return Leaf(
            self.name,
            self.kind,
            self.shapes,
            tuple(self.links),
            self.num_calls,
            self.reads_tokens,
            self.is_passed,
        )


@dataclass(slots=True)
class _Frame:
    """A leaf that is being called."""

    name: str
    module: nn.Module
    inputs: list[Tensor]
    is_atomic: bool
    parameters: frozenset[int] = field(default_factory=frozenset[int])


class _Tracer(TorchFunctionMode):
    """Follows provenance through one call; see `paceline.models.provenance`."""

    def __init__(self, module: nn.Module, tokens_BT: Tensor) -> None:
        super().__init__()
        self.module = module
        self.tokens_BT = tokens_BT
        self.seen: dict[str, _Seen] = {}
        self.outputs: dict[str, Tensor] = {}
        self.direct: set[str] = set()
        self._known: dict[int, Provenance] = {}
        self._kept: list[Tensor] = []  # an id is a tensor's only while that lives
        self._frames: list[_Frame] = []
        self._sizes: dict[str, int] = {}
        self._readers: dict[str, int] = {}
        self._names = {id(p): name for name, p in module.named_parameters()}

    def known(self, tensor: Tensor) -> Provenance:
        """Where a tensor comes from; sources that no group can hold are one, the whole."""
        found = self._known.get(id(tensor))
        if found is None:
            is_made = tensor.requires_grad and id(tensor) not in self._names
            return whole_rows(tensor) if is_made else {}
        kept = {k: r for k, r in found.items() if self._readers.get(k[0], 0) <= _MAX_READERS}
        return kept if len(kept) == len(found) else kept | whole_rows(tensor)

    def mixed(self) -> set[str]:
        """The sources that are read as a whole, or by too many to be told apart."""
        return {source for source, count in self._readers.items() if count > _MAX_READERS}

    @contextmanager
    def hooks(self) -> Generator[None]:
        with ExitStack() as stack:
            for name, leaf in leaves_of(self.module):
                before = leaf.register_forward_pre_hook(self._entering(name), with_kwargs=True)
                after = leaf.register_forward_hook(self._leaving(), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        options = kwargs or {}
        result = func(*args, **options)
        if self._frames and self._frames[-1].is_atomic:
            return result
        outputs = [t for t in tensors_in(result) if t.is_floating_point() or t.is_complex()]
        if plain_name(func) == "__setitem__":
            outputs = [args[0]]
        if outputs:
            self._note_parameters(args, options)
            found: list[Provenance] = [{} for _ in outputs]
            if any(self.known(t) for t in (*tensors_in(args), *tensors_in(options))):
                found = follow(func, args, options, outputs, self.known)
            for output, provenance in zip(outputs, found, strict=True):
                self._keep(output, provenance)
                if is_in_place(func):
                    self._spread(output, provenance)
        return result

    def _note_parameters(self, arguments: Any, options: Any) -> None:
        """A parameter that no leaf of its own is using is a source like any other."""
        own = frozenset[int]().union(*(frame.parameters for frame in self._frames))
        for tensor in (*tensors_in(arguments), *tensors_in(options)):
            name = self._names.get(id(tensor))
            if name is not None and id(tensor) not in own:
                self.direct |= {name}
                self._start(name, tensor)

    def _keep(self, tensor: Tensor, provenance: Provenance) -> None:
        self._kept.append(tensor)
        self._known[id(tensor)] = provenance

    def _spread(self, written: Tensor, provenance: Provenance) -> None:
        """What is written to a tensor is in all others that lie in the same memory."""
        place = written.untyped_storage().data_ptr()
        for tensor in {id(kept): kept for kept in self._kept}.values():
            if tensor is not written and tensor.untyped_storage().data_ptr() == place:
                self._known[id(tensor)] = mixed_in(self.known(tensor), provenance, tensor.shape)

    def _start(self, name: str, tensor: Tensor) -> None:
        """A tensor becomes a source."""
        if tensor.dim() and tensor.is_floating_point():
            self._sizes[name] = tensor.shape[-1]
            self._keep(tensor, source_rows(name, tensor))

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            shapes = {key: p.dim() for key, p in module.named_parameters(recurse=False)}
            is_atomic = shapes in ({"weight": 2}, {"weight": 2, "bias": 1})
            inputs = [*tensors_in(args), *tensors_in(kwargs)]
            parameters = frozenset(id(p) for p in module.parameters(recurse=False))
            self._frames.append(_Frame(name, module, inputs, is_atomic, parameters))

        return hook

    def _leaving(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            del module, args, kwargs
            frame = self._frames[-1]
            try:
                self._leave(frame, list(tensors_in(output)))
            finally:
                self._frames.pop()

        return hook

    def _leave(self, frame: _Frame, outputs: list[Tensor]) -> None:
        """Notes a leaf, and where its outputs come from."""
        kind = leaf_kind(frame.module, frame.inputs, outputs) if frame.is_atomic else "other"
        read = [provenance for tensor in frame.inputs if (provenance := self.known(tensor))]
        seen = self._note(frame, kind, read)
        if kind != "other":
            seen.reads_tokens = kind == "embedding" and _is_tokens(frame.inputs[0], self.tokens_BT)
            self.outputs[frame.name] = outputs[0].detach().clone()
            self._start(frame.name, outputs[0])
            return
        for output in outputs:
            provenance = self.known(output)
            if frame.is_atomic and len(read) == 1 and output.shape == frame.inputs[0].shape:
                provenance = widened(read[0], (-1,), type(frame.module).__name__)
                provenance = {
                    key: rows._replace(
                        low=rows.low.expand(output.shape), high=rows.high.expand(output.shape)
                    )
                    for key, rows in provenance.items()
                }
            if provenance and not self._is_wide(provenance):
                seen.is_passed = True
                self._keep(output, provenance)
            else:
                self._start(frame.name, output)
                for source in {source for source, _ in provenance} - {WHOLE}:
                    self._readers[source] = _MAX_READERS + 1

    def _note(self, frame: _Frame, kind: LeafKind, read: list[Provenance]) -> _Seen:
        for source in {source for provenance in read for source, _ in provenance} - {WHOLE}:
            self._readers[source] = self._readers.get(source, 0) + 1
        links = [link for provenance in read for link in links_of(provenance)]
        if frame.name in self.seen:
            self.seen[frame.name].num_calls += 1
            self.seen[frame.name].links += links
            return self.seen[frame.name]
        named = frame.module.named_parameters(recurse=False)
        seen = _Seen(frame.name, kind, {key: tuple(p.shape) for key, p in named}, links)
        self.seen[frame.name] = seen
        return seen

    def _is_wide(self, provenance: Provenance) -> bool:
        """Whether some source is mixed as a whole, as a norm of the residual stream does."""
        return any(
            source == WHOLE
            or bool((rows.low == 0).all() and (rows.high == self._sizes[source] - 1).all())
            for (source, _), rows in provenance.items()
        )


def _is_tokens(ids: Tensor, tokens_BT: Tensor) -> bool:
    return ids.numel() == tokens_BT.numel() and torch.equal(ids.flatten(), tokens_BT.flatten())
