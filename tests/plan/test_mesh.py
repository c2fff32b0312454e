from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.plan.mesh import AXES, DATA_AXES, MeshConfig

DEGREES = st.integers(1, 4)
MESHES = st.builds(MeshConfig, **dict.fromkeys([*AXES, "ep"], DEGREES))


def test_axes_stand_outermost_first():
    assert AXES == ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    assert DATA_AXES == ("dp_replicate", "dp_shard")


def test_a_mesh_by_hand():
    mesh = MeshConfig(pp=2, dp_replicate=3, dp_shard=2, cp=1, tp=4, ep=8)
    assert mesh.shape == (2, 3, 2, 1, 4)
    assert mesh.num_ranks == 48  # ep re-groups ranks and adds none
    assert mesh.num_data_ranks == 6
    # 39 = 1 * 24 + 1 * 8 + 1 * 4 + 3
    assert mesh.coordinate(39) == {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 0, "tp": 3}
    assert mesh.data_index(39) == 3
    assert tuple(mesh.coordinate(0)) == AXES
    assert MeshConfig().to_dict() == dict.fromkeys([*AXES, "ep"], 1)


@settings(deadline=None, max_examples=40)
@given(MESHES)
def test_ranks_and_coordinates_are_one_to_one(mesh):
    assert mesh.num_ranks == math.prod(mesh.shape)
    places = [tuple(mesh.coordinate(rank).values()) for rank in range(mesh.num_ranks)]
    assert all(
        0 <= index < degree
        for place in places
        for index, degree in zip(place, mesh.shape, strict=True)
    )
    # Row-major order: sorted, and each place once.
    assert places == sorted(set(places))


@settings(deadline=None, max_examples=40)
@given(MESHES)
def test_every_data_index_is_held_by_the_ranks_of_one_model(mesh):
    data_indices = [mesh.data_index(rank) for rank in range(mesh.num_ranks)]
    counts = Counter(data_indices)
    assert sorted(counts) == list(range(mesh.num_data_ranks))
    assert set(counts.values()) == {mesh.pp * mesh.cp * mesh.tp}
    for rank in range(mesh.num_ranks):
        place = mesh.coordinate(rank)
        index = place["dp_replicate"] * mesh.dp_shard + place["dp_shard"]
        assert data_indices[rank] == index  # wherever it sits on pp, cp and tp


def test_groups_by_hand():
    mesh = MeshConfig(dp_shard=2, tp=3)
    assert mesh.groups(("tp",)) == [(0, 1, 2), (3, 4, 5)]
    assert mesh.groups(("dp_shard",)) == [(0, 3), (1, 4), (2, 5)]
    assert mesh.groups(("tp", "dp_shard")) == [(0, 1, 2, 3, 4, 5)]
    assert mesh.groups(("pp",)) == mesh.groups(()) == [(rank,) for rank in range(6)]


@settings(deadline=None, max_examples=40)
@given(MESHES, st.sets(st.sampled_from(AXES)))
def test_groups_part_the_ranks_into_those_that_differ_on_their_axes_alone(mesh, axes):
    groups = mesh.groups(tuple(axes))
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.num_ranks))
    size = math.prod(mesh.shape[AXES.index(axis)] for axis in axes)
    for group in groups:
        assert list(group) == sorted(group)
        assert len(group) == size
        places = [mesh.coordinate(rank) for rank in group]
        assert all(place[a] == places[0][a] for place in places for a in AXES if a not in axes)


@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_outside_the_mesh_is_an_error(rank):
    mesh = MeshConfig(dp_shard=3, tp=2)
    with pytest.raises(ValueError, match=f"rank {rank} is not in a mesh of 6 ranks"):
        mesh.coordinate(rank)


def test_a_rank_is_named_with_its_place_on_the_axes_that_have_several():
    mesh = MeshConfig(pp=2, dp_shard=1, tp=3)
    assert [mesh.name_rank(rank) for rank in (0, 5)] == ["rank 0 (pp=0 tp=0)", "rank 5 (pp=1 tp=2)"]
    assert MeshConfig().name_rank(0) == "rank 0"


def test_experts_re_group_the_ranks_tensor_neighbours_first():
    mesh = MeshConfig(pp=2, dp_shard=2, cp=2, tp=2, ep=4)
    assert mesh.ep_replicate == 2
    # 13 = 1 * 8 + 1 * 4 + 0 * 2 + 1: of the eight ranks of its stage the sixth
    assert mesh.expert_coordinate(13) == {"pp": 1, "dp_replicate": 0, "ep_replicate": 1, "ep": 1}
    assert mesh.groups(("ep",))[:2] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert mesh.groups(("ep_replicate",))[:2] == [(0, 4), (1, 5)]
