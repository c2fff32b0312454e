"""Parts of tensors, written by torch's distributed checkpoint.

Every element is written once, by a rank that owns it (of replicas, by one of them).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from paceline.optim.parts import NamedParts, Part, named_parts
from paceline.plan.layout import Box


class PartsWriter(DefaultSavePlanner):
    """Writes what each rank owns.

    Args:
        parts: of this rank.
    """

    def __init__(self, parts: NamedParts) -> None:
        super().__init__(flatten_state_dict=False)
        # A name may have several parts; what they own begins at different places.
        self._owned = {
            (name, part.place.owned.offsets): part
            for name, part in named_parts(parts)
            if part.place.owned.num_elements
        }

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(name, part) for (name, _), part in self._owned.items()]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.index.offset is not None
        part = self._owned[write_item.index.fqn, tuple(write_item.index.offset)]
        return part.local.detach()[part.place.owned.within(part.place.box)]


def _write_item(name: str, part: Part) -> WriteItem:
    chunk = _chunk(part.place.owned)
    data = TensorWriteData(
        chunk=chunk,
        properties=TensorProperties.create_from_tensor(part.local),
        size=torch.Size(part.place.shape),
    )
    index = MetadataIndex(name, chunk.offsets)
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
