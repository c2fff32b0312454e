"""Every layout of the matrix, certified: docs/certified.md says the same with figures."""

from __future__ import annotations

import pytest

from paceline.plan.check import check
from paceline.verify.certify import BOUND, certify
from paceline.verify.matrix import layouts

LAYOUTS = layouts()


def test_every_layout_is_legal_and_has_a_name_of_its_own():
    assert len(LAYOUTS) > 90
    for name, (plan, spec) in LAYOUTS.items():
        assert check(plan, spec) == [], name


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_the_matrix_is_certified(name):
    certificate = certify(*LAYOUTS[name])
    assert certificate.certified, certificate.worst
    assert max(certificate.max_rel_grad_error, certificate.max_rel_param_error) <= BOUND == 1e-12
