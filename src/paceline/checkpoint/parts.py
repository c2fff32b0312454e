"""Parts of tensors, written and read by torch's distributed checkpoint.

Every element is written once, by a rank that owns it (of replicas, by one of them), and a rank
reads what it has, whatever the parts that were written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from paceline.core.errors import DataError
from paceline.optim.parts import Part
from paceline.plan.layout import Box


class PartsWriter(DefaultSavePlanner):
    """Writes what each rank owns.

    Args:
        parts: of this rank, by name.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        owned = {name: part for name, part in self._parts.items() if part.place.owned.num_elements}
        self.plan = SavePlan([_write_item(name, part) for name, part in owned.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        part = self._parts[write_item.index.fqn]
        return part.local.detach()[part.place.owned.within(part.place.box)]


class PartsReader(DefaultLoadPlanner):
    """Fills what each rank has.

    Args:
        parts: of this rank, by name.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(flatten_state_dict=False)
        self._parts = parts

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[Any] = []
        for name, part in self._parts.items():
            stored = self.metadata.state_dict_metadata[name]
            if not isinstance(stored, TensorStorageMetadata):
                raise DataError(f"{name} is no tensor in the checkpoint")
            if part.place.box.num_elements:
                items += create_read_items_for_chunk_list(name, stored, [_chunk(part.place.box)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._parts[index.fqn].local.detach()


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
