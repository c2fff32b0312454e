"""A core of attention on forked ranks, and what one process makes of the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.data.batch import Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.attention import AttentionSite, attend_within
from paceline.models.layout import Layout
from paceline.parallel.context.share import SharedSequences
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import ContextConfig, Plan

CPU = torch.device("cpu")
H = 8
NAMES = "output", "query gradient", "key gradient", "value gradient"


@dataclass(frozen=True, slots=True)
class Rows:
    """Random queries, keys, values and output gradients of whole rows, in float64.

    Attributes:
        documents_BS: of the rows.
        num_heads: of queries.
        num_kv_heads: of keys.
        window: of the attention.
    """

    documents_BS: Tensor
    num_heads: int = 4
    num_kv_heads: int = 2
    window: int | None = None

    @property
    def site(self) -> AttentionSite:
        return AttentionSite(0, self.window, 0.5)

    def tensors(self) -> list[Tensor]:
        """Queries, keys, values and the gradient of the output, (B, S, heads, H)."""
        generator = torch.Generator().manual_seed(3)
        counts = self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads
        shape = self.documents_BS.shape
        return [
            torch.randn(*shape, count, H, generator=generator, dtype=torch.float64)
            for count in counts
        ]


def alone(rows: Rows) -> list[Tensor]:
    """Output and gradients of one process."""
    *inputs, grad = rows.tensors()
    leaves = [x.requires_grad_() for x in inputs]
    layout = Layout.of_documents(rows.documents_BS)
    out = attend_within(*leaves, layout=layout, site=rows.site)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@dataclass(frozen=True, slots=True)
class Found:
    """What ranks have made of rows.

    Attributes:
        whole: output and gradients, put together from all ranks.
        traffic: bytes of each rank, by the operation and purpose.
        links: bytes that went from one rank to another, by the two of them.
    """

    whole: list[Tensor]
    traffic: list[Counter[tuple[str, str]]]
    links: Counter[tuple[int, int]]


def on_ranks(
    rows: Rows,
    method: Any,
    cp: int,
    *,
    dtype: torch.dtype = torch.float64,
    degree: int | None = None,
    is_forward_only: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> Found:
    """Runs a method on forked ranks.

    Args:
        rows: to attend over.
        method: its name.
        cp: ranks.
        dtype: of everything.
        degree: ranks that exchange heads.
        is_forward_only: whether there is no backward pass.
        prepare: called on each rank before.
    """
    context = ContextConfig(method=method, ulysses_degree=degree)
    plan = Plan(mesh=MeshConfig(cp=cp), context=context)

    def work(rank: int) -> Any:
        prepare()
        world = World(plan.mesh, rank, CPU)
        shared = SharedSequences(plan, world)
        links = _count_links(shared.attend)
        empty_BS = torch.zeros_like(rows.documents_BS)
        part = shared.share(Batch(empty_BS, empty_BS, rows.documents_BS))
        assert part.places_T is not None
        layout = Layout.of_documents(part.documents_BT, part.places_T)
        missing = part.documents_BT.shape[1] - empty_BS.shape[1]
        *inputs, grad = (
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))[:, part.places_T].to(dtype)
            for x in rows.tensors()
        )
        leaves = [x.requires_grad_() for x in inputs]
        out = shared.attend(*leaves, layout=layout, site=rows.site)
        found = [out.detach()]
        if not is_forward_only:
            found += torch.autograd.grad(out, leaves, grad)
        sent: Counter[tuple[str, str]] = Counter()
        for operation, _, size_bytes, purpose in world.traffic.transfers:
            sent[operation, purpose] += size_bytes
        places = part.places_T.numpy()
        return places, [x.double().numpy() for x in found], dict(sent), dict(links)

    found = run_ranks(work, cp)
    order = torch.cat([torch.from_numpy(places) for places, *_ in found]).argsort()
    length = rows.documents_BS.shape[1]
    tensors = zip(*(parts for _, parts, *_ in found), strict=True)
    wholes = [torch.cat([torch.from_numpy(x) for x in of_ranks], dim=1) for of_ranks in tensors]
    links: Counter[tuple[int, int]] = Counter()
    for rank, (*_, sent) in enumerate(found):
        links.update({(rank, other): size_bytes for other, size_bytes in sent.items()})
    traffic = [Counter(sent) for _, _, sent, _ in found]
    return Found([whole[:, order][:, :length] for whole in wholes], traffic, links)


def _count_links(core: Any) -> Counter[int]:
    """Bytes that this rank sends each other one, from now on."""
    peers, links = core._ring._peers, Counter[int]()
    send = peers.send

    def counted(tensor: Tensor, destination: int, purpose: str) -> None:
        links[destination] += tensor.nbytes
        send(tensor, destination, purpose)

    peers.send = counted
    return links
