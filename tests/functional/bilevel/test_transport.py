"""Transport polytopes: against a quadratic program, Sinkhorn's iteration and finite differences."""

import pytest
import torch
from torch import Tensor

from lightning_hpo.functional.bilevel.polyhedron import projection_polyhedron
from lightning_hpo.functional.bilevel.transport import (
    kl_projection_birkhoff,
    kl_projection_transport,
    projection_birkhoff,
    projection_transport,
)

G = torch.Generator().manual_seed(0)
X = torch.randn(4, 3, dtype=torch.float64, generator=G)
ROWS = torch.tensor([0.3, 0.7, 0.4, 0.6], dtype=torch.float64)
COLUMNS = torch.tensor([0.5, 1.1, 0.4], dtype=torch.float64)
both = pytest.mark.parametrize("project", [projection_transport, kl_projection_transport])


@both
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_plans_have_their_marginals(project, size: float) -> None:
    plan = project(size * X, (ROWS, COLUMNS))
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), ROWS, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plan.sum(0), COLUMNS, rtol=1e-10, atol=1e-10)
    again = project(plan if project is projection_transport else plan.log(), (ROWS, COLUMNS))
    torch.testing.assert_close(again, plan, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [0.3, 5.0])
def test_euclidean_plan_is_the_solution_of_a_quadratic_program(size: float) -> None:
    eye = torch.eye(12, dtype=torch.float64)
    cells = eye.reshape(12, 4, 3)
    A = torch.cat([cells.sum(2).T, cells.sum(1).T[:-1]])  # one of the marginals follows from the others
    p = projection_polyhedron(
        size * X.flatten(), (A, torch.cat([ROWS, COLUMNS[:-1]]), -eye, torch.zeros(12, dtype=torch.float64))
    )
    plan = projection_transport(size * X, (ROWS, COLUMNS))
    torch.testing.assert_close(plan.flatten(), p, rtol=1e-8, atol=1e-8)
    assert (plan < 1e-12).sum() >= 3


def test_entropic_plan_is_the_limit_of_sinkhorn() -> None:
    plan = X.exp()
    for _ in range(3000):
        plan = plan * (ROWS / plan.sum(1))[:, None]
        plan = plan * (COLUMNS / plan.sum(0))
    torch.testing.assert_close(kl_projection_transport(X, (ROWS, COLUMNS)), plan, rtol=1e-10, atol=1e-12)


@both
def test_derivatives_in_the_matrix_and_the_marginals(project) -> None:
    def plan(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return project(x, (rows.softmax(0), columns.softmax(0)))  # equal sums, whatever moves

    inputs = tuple(part.clone().requires_grad_() for part in (X, ROWS, COLUMNS))
    assert torch.autograd.gradcheck(plan, inputs, atol=1e-5, check_forward_ad=True)


def test_doubly_stochastic_matrices() -> None:
    x = torch.randn(4, 4, dtype=torch.float64, generator=G)
    for project in (projection_birkhoff, kl_projection_birkhoff):
        plan = project(x)
        torch.testing.assert_close(plan.sum(0), torch.ones(4).double(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(plan.sum(1), torch.ones(4).double(), rtol=1e-10, atol=1e-10)
    order = torch.tensor([2, 0, 3, 1])
    far = projection_birkhoff(100 * torch.eye(4, dtype=torch.float64)[order])
    torch.testing.assert_close(far, torch.eye(4, dtype=torch.float64)[order])


def test_single_precision() -> None:
    for project in (projection_transport, kl_projection_transport):
        x = X.float().requires_grad_()
        plan = project(x, (ROWS.float(), COLUMNS.float()))
        torch.testing.assert_close(plan.double(), project(X, (ROWS, COLUMNS)), rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad((plan * X.float().sin()).sum(), x)
        assert torch.isfinite(gradient).all()


def test_empty_polytopes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 0; column marginals must be positive; .*same sum"):
        projection_transport(X, (-ROWS, 0 * COLUMNS))
    with pytest.raises(ValueError, match="row marginals must be positive"):
        kl_projection_transport(X, (torch.tensor([0.0, 1.0, 0.4, 0.6]), COLUMNS))
    with pytest.raises(ValueError, match=r"shapes \(n, m\), \(n,\) and \(m,\), got \(4, 3\), \(3,\) and \(4,\)"):
        projection_transport(X, (COLUMNS, ROWS))
    with pytest.raises(ValueError, match="same sum"):
        projection_birkhoff(X)
