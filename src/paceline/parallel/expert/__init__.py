"""Expert parallelism: the ranks of `mesh.ep` share out the experts of each layer."""

from paceline.core.registry import NameTable

DISPATCHES = NameTable(
    "expert dispatch", {"all-to-all": "paceline.parallel.expert.all_to_all:AllToAll"}
)
"""Name to what is made of a world: a `paceline.models.dispatch.Dispatch` over its `ep` axis."""
