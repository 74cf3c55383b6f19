"""BO-REP against a NumPy loop, closed forms and the published behaviour."""

import math
from itertools import pairwise, repeat

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel, SingleLoopState
from lightning_hpo.functional.bilevel.estimators import ESTIMATORS
from lightning_hpo.functional.bilevel.outer_gradient import largest_curvature, outer_gradient
from lightning_hpo.functional.bilevel.problem import Problem

NOTHING = repeat(None)  # full gradients: no batches


class Quadratic:
    """g = y'Ay/2 - y'(Bx + c), f = |y - t|^2/2 + x'Qx/2; Phi has a closed form."""

    def __init__(self, dx: int = 3, dy: int = 4, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        root = generator.normal(size=(dy, dy)) / 2
        self.A = root @ root.T + 0.5 * np.eye(dy)
        self.A /= np.linalg.eigvalsh(self.A)[-1] / 2
        self.B, self.c = generator.normal(size=(dy, dx)), generator.normal(size=dy)
        self.t, self.Q = generator.normal(size=dy), 0.1 * np.eye(dx)
        self.x0, self.y0 = generator.normal(size=dx), generator.normal(size=dy)
        self.tensors = {k: torch.tensor(getattr(self, k)) for k in ("A", "B", "c", "t", "Q")}

    def inner(self, y: dict[str, Tensor], x: dict[str, Tensor], _: object = None) -> Tensor:
        q, v = self.tensors, y["y"]
        return v @ q["A"] @ v / 2 - v @ (q["B"] @ x["x"] + q["c"])

    def outer(self, y: dict[str, Tensor], x: dict[str, Tensor], _: object = None) -> Tensor:
        q, v = self.tensors, x["x"]
        return (y["y"] - q["t"]).square().sum() / 2 + v @ q["Q"] @ v / 2

    def phi(self, x: np.ndarray) -> float:
        y = np.linalg.solve(self.A, self.B @ x + self.c)
        return float(((y - self.t) ** 2).sum() / 2 + x @ self.Q @ x / 2)

    @property
    def best(self) -> float:
        inverse = np.linalg.inv(self.A)
        J = inverse @ self.B
        x = np.linalg.solve(J.T @ J + self.Q, J.T @ (self.t - inverse @ self.c))
        return self.phi(x)

    def method(self, **settings) -> SingleLoopBilevel:
        return SingleLoopBilevel(
            self.inner, self.outer, **{"lr": 0.02, "inner_lr": 0.3, "z_lr": 0.3, "interval": 2, **settings}
        )

    def start(self, method: SingleLoopBilevel) -> SingleLoopState:
        return method.start({"y": torch.tensor(self.y0)}, {"x": torch.tensor(self.x0)})


def numpy_loop(
    q, steps, *, eta=0.02, gamma=0.3, nu=0.3, beta=0.9, interval=2, inner=3, radius=math.inf, normalize=True
):
    """The algorithm once more, from the equations alone."""
    x, y, z, m = q.x0.copy(), q.y0.copy(), np.zeros_like(q.y0), np.zeros_like(q.x0)
    for k in range(steps):
        if k > 0 and k % interval == 0:
            center = y
            for _ in range(inner):
                y = y - gamma * (q.A @ y - q.B @ x - q.c)
                apart = np.linalg.norm(y - center)
                if apart > radius:
                    y = center + (y - center) * radius / apart
        h = q.Q @ x + q.B.T @ z  # the cross derivative is -B
        z = z - nu * (q.A @ z - (y - q.t))
        m = beta * m + (1 - beta) * h
        x = x - eta * (m / np.linalg.norm(m) if normalize else m)
    return x, y, z, m


@pytest.mark.parametrize("settings", [{}, {"radius": 0.05}, {"radius": 0.3, "interval": 3}, {"normalize": False}])
def test_iterates_are_those_of_a_numpy_loop(settings):
    q = Quadratic()
    method = q.method(**settings)
    state = q.start(method)
    for _ in range(10):
        state, _ = method.step(state, NOTHING, NOTHING)
    x, y, z, m = numpy_loop(q, 10, **settings)
    for ours, theirs in ((state.outer["x"], x), (state.inner["y"], y), (state.z["y"], z), (state.m["x"], m)):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)
    if "radius" in settings:  # the ball was felt
        assert abs(y - numpy_loop(q, 10, **{**settings, "radius": math.inf})[1]).max() > 1e-3


def test_the_first_signs():
    """g = (y - x)^2/2, f = (y - 1)^2/2: z = y - 1 and h = z, so x goes towards 1."""
    problem = Problem(lambda y, x: (y["y"] - x["x"]).square() / 2, lambda y, x: (y["y"] - 1).square() / 2)
    y, x, z = ({name: torch.tensor(value)} for name, value in (("y", 3.0), ("x", 3.0), ("y", 2.0)))
    found = outer_gradient(problem, y, x, z, z_lr=0.5)
    assert found.gradients["x"].item() == 2.0
    assert found.z["y"].item() == 2.0  # it is the solution already
    assert found.norms.tolist() == [2.0, 2.0, 2.0, 0.0]


def test_the_cross_derivative_of_a_ridge_penalty():
    """h = -e^x y'z for g = |Ay - b|^2/2n + e^x |y|^2/2, written out by hand."""
    generator = torch.Generator().manual_seed(0)
    a, b, y, z = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((9, 4), (9,), (4,), (4,)))
    problem = Problem(
        lambda p, x: (a @ p["y"] - b).square().mean() / 2 + x["x"].exp() * p["y"].square().sum() / 2,
        lambda p, x: p["y"].sum(),
    )
    x = torch.tensor(-0.7, dtype=torch.float64)
    found = outer_gradient(problem, {"y": y}, {"x": x}, {"y": z}, z_lr=0.1)
    assert found.gradients["x"].item() == pytest.approx((-x.exp() * (y @ z)).item(), rel=1e-12)
    hessian = a.T @ a / 9 + x.exp() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found.z["y"], z - 0.1 * (hessian @ z - 1), rtol=1e-12, atol=1e-14)


def small_network(dtype=torch.float64):
    """An RNN and a head, with the dense second derivatives of its loss."""
    torch.manual_seed(0)
    encoder, head = torch.nn.RNN(3, 4, batch_first=True).to(dtype), torch.nn.Linear(4, 2).to(dtype)
    inputs, labels = torch.randn(6, 5, 3, dtype=dtype), torch.arange(6) % 2
    outer = {name: p.detach() for name, p in encoder.named_parameters()}
    inner = {name: p.detach() for name, p in head.named_parameters()}

    def loss(y, x):
        hidden = torch.func.functional_call(encoder, x, (inputs,))[0].amax(1)
        penalty = torch.stack([v.square().sum() for v in y.values()]).sum()
        return F.cross_entropy(torch.func.functional_call(head, y, (hidden,)), labels) + 0.05 * penalty

    def score(y, x):
        hidden = torch.func.functional_call(encoder, x, (inputs.flip(0),))[0].amax(1)
        return F.cross_entropy(torch.func.functional_call(head, y, (hidden,)), labels)

    return Problem(loss, score), inner, outer


def ravel(tensors):
    return torch.cat([value.reshape(-1) for value in tensors.values()])


def dense(problem, inner, outer, z):
    """h and Hz - v from a dense Hessian of everything."""
    sizes = [value.numel() for value in (*inner.values(), *outer.values())]

    def split(flat):
        parts = iter(flat.split(sizes))
        return tuple({n: next(parts).view(v.shape) for n, v in like.items()} for like in (inner, outer))

    flat = torch.cat([ravel(inner), ravel(outer)])
    hessian = torch.autograd.functional.hessian(lambda p: problem.train_loss(*split(p)), flat)
    slope = torch.autograd.functional.jacobian(lambda p: problem.val_loss(*split(p)), flat)
    n = sum(value.numel() for value in inner.values())
    return slope[n:] - hessian[n:, :n] @ z, hessian[:n, :n] @ z - slope[:n]


@pytest.mark.parametrize(("product", "tolerance"), [("exact", 1e-10), ("fd", 1e-7)])
def test_products_are_those_of_dense_matrices(product, tolerance):
    problem, inner, outer = small_network()
    z = {name: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).double() for name, v in inner.items()}
    found = outer_gradient(problem, inner, outer, z, z_lr=0.5, product=product)
    h, residual = dense(problem, inner, outer, ravel(z))
    assert (ravel(found.gradients) - h).norm() < tolerance * h.norm()
    assert (ravel(found.z) - (ravel(z) - 0.5 * residual)).norm() < tolerance * ravel(z).norm()


def test_differences_in_single_precision():
    problem, inner, outer = small_network(torch.float32)
    z = {name: torch.ones_like(v) for name, v in inner.items()}
    exact, fd = (outer_gradient(problem, inner, outer, z, z_lr=0.5, product=p) for p in ("exact", "fd"))
    assert (ravel(fd.gradients) - ravel(exact.gradients)).norm() < 1e-3 * ravel(exact.gradients).norm()
    assert (ravel(fd.z) - ravel(exact.z)).norm() < 1e-4 * ravel(exact.z).norm()


def test_an_lstm_is_differentiated_twice():
    """float32 on the CPU goes through another kernel than float64, and must give the same."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        lstm = torch.nn.LSTM(3, 4, batch_first=True).to(dtype)
        x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3)).to(dtype)
        problem = Problem(
            lambda y, p, lstm=lstm, x=x: (torch.func.functional_call(lstm, p, (x,))[0].amax(1) @ y["y"]).square().sum(),
            lambda y, p: y["y"].sum(),
        )
        outer = {name: p.detach() for name, p in lstm.named_parameters()}
        y = {"y": torch.ones(4, dtype=dtype)}
        found.append(ravel(outer_gradient(problem, y, outer, y, z_lr=0.1).gradients).double())
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


def test_z_converges_at_the_rate_of_the_extreme_eigenvalues():
    q = Quadratic()
    problem = Problem(q.inner, q.outer)
    y, x, z = {"y": torch.tensor(q.y0)}, {"x": torch.tensor(q.x0)}, None
    solution = np.linalg.solve(q.A, q.y0 - q.t)
    errors = []
    for _ in range(60):
        z = outer_gradient(problem, y, x, z, z_lr=0.3).z
        errors.append(np.linalg.norm(z["y"].numpy() - solution))
    rate = abs(1 - 0.3 * np.linalg.eigvalsh(q.A)).max()
    assert errors[-1] / errors[-2] == pytest.approx(rate, rel=1e-3)
    assert errors[-1] < rate**59 * np.linalg.norm(solution) * 1.01


def test_ma_soba_is_this_without_normalisation_and_period():
    """One inner step an iteration, SGD on a moving average."""
    q = Quadratic()
    method = q.method(normalize=False, interval=1, inner_steps=1, lr=0.5)
    state = q.start(method)
    x, y, z, m = q.x0, q.y0, np.zeros(4), np.zeros(3)
    for k in range(12):
        y = y - 0.3 * (q.A @ y - q.B @ x - q.c) if k else y
        h, z = q.Q @ x + q.B.T @ z, z - 0.3 * (q.A @ z - y + q.t)
        m = 0.9 * m + 0.1 * h
        x = x - 0.5 * m
        state, _ = method.step(state, NOTHING, NOTHING)
        np.testing.assert_allclose(state.outer["x"].numpy(), x, rtol=0, atol=1e-12)


def test_steps_have_the_length_that_was_asked_for():
    q = Quadratic()
    method = q.method(lr=0.07)
    state = q.start(method)
    for _ in range(20):
        before = state.outer["x"]
        state, _ = method.step(state, NOTHING, NOTHING)
        assert (state.outer["x"] - before).norm().item() == pytest.approx(0.07, abs=1e-12)
    before = state.outer["x"]
    state, _ = method.step(state, NOTHING, NOTHING, lr=0.01)
    assert (state.outer["x"] - before).norm().item() == pytest.approx(0.01, abs=1e-12)


def test_one_norm_for_all_or_one_for_each():
    def losses(scale):
        def inner(y, x, _):
            return (y["y"] - x["large"] * scale - x["small"]).square().sum() / 2

        return inner, lambda y, x, _: y["y"].square().sum() / 2

    start = {"y": torch.ones(1)}, {"large": torch.ones(1), "small": torch.ones(1)}
    for normalize, lengths in (("global", (1.0, 0.001)), ("per_group", (1.0, 1.0))):
        method = SingleLoopBilevel(*losses(1000.0), lr=1.0, inner_lr=0.1, z_lr=1.0, normalize=normalize)
        state = method.start(*start)
        for _ in range(2):  # in the first one z is 0, and so is h
            before, (state, _) = state.outer, method.step(state, NOTHING, NOTHING)
        moved = [(state.outer[name] - before[name]).abs().item() for name in ("large", "small")]
        assert moved == pytest.approx(lengths, rel=1e-4)


def test_a_short_momentum_gives_a_short_step():
    q = Quadratic()
    states = {}
    for least in (1e-10, 1e3):
        method = q.method(min_norm=least, lr=0.5)
        states[least], info = method.step(q.start(method), NOTHING, NOTHING)
    moved = (states[1e3].outer["x"] - torch.tensor(q.x0)).norm().item()
    assert moved == pytest.approx(0.5 * 0.1 * info.gradient_norm / 1e3, rel=1e-12)


@pytest.mark.parametrize(("interval", "inner_steps"), [(1, 1), (2, 3), (5, 4), (3, 0)])
def test_the_inner_loss_is_asked_no_more_often_than_the_schedule_says(interval, inner_steps):
    q, asked = Quadratic(), []

    def inner(y, x, batch):
        asked.append(batch)
        return q.inner(y, x)

    method = SingleLoopBilevel(
        inner, q.outer, lr=0.1, inner_lr=0.1, z_lr=0.1, interval=interval, inner_steps=inner_steps
    )
    state, batches, counts = q.start(method), iter(range(1000)), []
    for _ in range(11):
        before = len(asked)
        state, info = method.step(state, batches, NOTHING)
        counts.append(len(asked) - before)
        assert info.inner_steps == counts[-1] - 1
    expected = [1 + (inner_steps if k and k % interval == 0 else 0) for k in range(11)]
    assert counts == expected
    assert asked == list(range(sum(expected)))  # each on a batch of its own


def test_settings_of_stocbio_give_the_series():
    problem, inner, outer = small_network()
    found = outer_gradient(problem, inner, outer, z_lr=0.4, solver="neumann", neumann_steps=7)
    known = ESTIMATORS["ift_neumann"](problem, inner, outer, steps=7, alpha=0.4)
    torch.testing.assert_close(found.gradients, known.gradients, rtol=1e-10, atol=1e-12)


def test_the_series_and_the_running_solution_agree_in_the_limit():
    q = Quadratic()
    problem = Problem(q.inner, q.outer)
    y, x, z = {"y": torch.tensor(q.y0)}, {"x": torch.tensor(q.x0)}, None
    for _ in range(400):
        z = outer_gradient(problem, y, x, z, z_lr=0.4).z
    step = outer_gradient(problem, y, x, z, z_lr=0.4)
    series = outer_gradient(problem, y, x, z_lr=0.4, solver="neumann", neumann_steps=400)
    torch.testing.assert_close(step.gradients, series.gradients, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(step.z, series.z, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("normalize", ["global", False])
def test_multiplying_the_outer_loss_changes_nothing_but_the_scale_of_z_and_m(normalize):
    q = Quadratic()
    states = []
    lr = 0.01 if normalize else 1e-5
    for scale in (1.0, 1000.0):
        method = SingleLoopBilevel(
            q.inner,
            lambda y, x, _, scale=scale: scale * q.outer(y, x),
            lr=lr,
            inner_lr=0.3,
            z_lr=0.3,
            normalize=normalize,
        )
        state = q.start(method)
        for _ in range(30):
            state, _ = method.step(state, NOTHING, NOTHING)
        states.append(state)
    one, thousand = states
    moved = (one.outer["x"] - thousand.outer["x"]).norm() / one.outer["x"].norm()
    if normalize is False:
        assert moved > 1e-3  # a thousandfold step
        return
    assert moved < 1e-10
    torch.testing.assert_close(thousand.z["y"], 1000 * one.z["y"])
    torch.testing.assert_close(thousand.m["x"], 1000 * one.m["x"])


@pytest.mark.parametrize(("interval", "inner_steps", "rates"), [(2, 3, (0.02, 0.01, 0.005)), (5, 5, (0.02, 0.01))])
def test_the_gap_falls_with_the_square_of_the_step(interval, inner_steps, rates):
    q = Quadratic()
    methods = (q.method(lr=lr, interval=interval, inner_steps=inner_steps) for lr in rates)
    gaps = [gap(q, method, 1500) for method in methods]
    ratios = [first / second for first, second in pairwise(gaps)]
    assert all(3.2 <= ratio <= 4.8 for ratio in ratios), (gaps, ratios)


def gap(q, method, steps, last=200):
    state, gaps = q.start(method), []
    for k in range(steps):
        state, _ = method.step(state, NOTHING, NOTHING)
        if k >= steps - last:
            gaps.append(q.phi(state.outer["x"].numpy()) - q.best)
    return sum(gaps) / len(gaps)


def test_where_curvature_grows_with_the_gradient_normalised_steps_arrive_and_others_blow_up():
    """f = cosh(5(y - 1))/5 from x = -2, the card's own figures within 5 %."""

    def run(steps, **settings):
        method = SingleLoopBilevel(
            lambda y, x, _: (y["y"] - x["x"]).square() / 2,
            lambda y, x, _: (5 * (y["y"] - 1)).cosh() / 5,
            **{"inner_lr": 0.5, "z_lr": 0.3, **settings},
        )
        start = torch.tensor(-2.0, dtype=torch.float64)
        state, path = method.start({"y": start}, {"x": start.clone()}), []
        for _ in range(steps):
            state, _ = method.step(state, NOTHING, NOTHING)
            path.append(state.outer["x"].item())
        return path

    for lr, arrival, within in ((0.01, 298, 0.11), (0.005, 595, 0.055)):
        path = run(2000, lr=lr)
        arrived = next(k for k, x in enumerate(path, 1) if abs(x - 1) < 0.03)
        assert arrived == pytest.approx(arrival, rel=0.05)
        settled = path[arrived + 100 :]  # it overshoots once
        assert max(abs(x - 1) for x in settled) == pytest.approx(within, rel=0.05)
        assert max(abs(x - 1) for x in path[arrived:]) < 1.3 * within
    with pytest.warns(UserWarning, match="the outer loss is getting steeper"):
        assert abs(run(4, lr=1e-3, normalize=False)[-1]) > 1e6
    steep, ten = "the outer loss is getting steeper", "10 hypergradients in a row"
    with pytest.raises(FloatingPointError, match=ten), pytest.warns(UserWarning, match=steep):
        run(30, lr=1e-3, normalize=False)
    assert run(2000, lr=1e-7, normalize=False)[-1] == pytest.approx(-0.43, abs=0.02)


def test_sample_weights_get_a_dense_hypergradient_for_their_own_rows():
    """x is one weight a sample; a batch with repeated rows adds up, rows outside of it stay 0."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    rows = torch.tensor([1, 4, 4, 6])
    z = torch.randn(3, generator=generator, dtype=torch.float64)
    y = torch.randn(3, generator=generator, dtype=torch.float64)
    problem = Problem(
        lambda p, x: (x["weight"][rows].sigmoid() * (features[rows] @ p["y"]).square()).mean(),
        lambda p, x: p["y"].sum(),
    )
    weight = torch.full((8,), 0.3, dtype=torch.float64)
    found = outer_gradient(problem, {"y": y}, {"weight": weight}, {"y": z}, z_lr=0.1).gradients["weight"]
    slope = weight.sigmoid() * (1 - weight.sigmoid()) * 2 * (features @ y) * (features @ z) / 4
    expected = torch.zeros(8, dtype=torch.float64).index_add(0, rows, -slope[rows])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert found.count_nonzero() == 3


def test_power_iteration_finds_the_largest_curvature():
    q = Quadratic()
    problem = Problem(q.inner, q.outer)
    found = largest_curvature(problem, {"y": torch.tensor(q.y0)}, {"x": torch.tensor(q.x0)}, iterations=200)
    assert found.item() == pytest.approx(np.linalg.eigvalsh(q.A)[-1], rel=1e-6)


def test_a_state_goes_through_a_file_and_on_as_if_nothing_had_happened(tmp_path):
    q = Quadratic()
    method = q.method()
    state = q.start(method)
    for _ in range(5):
        state, _ = method.step(state, NOTHING, NOTHING)
    torch.save(state._asdict(), tmp_path / "state.pt")
    again = SingleLoopState(**torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(4):
        state, _ = method.step(state, NOTHING, NOTHING)
        again, _ = method.step(again, NOTHING, NOTHING)
    assert again.step == state.step == 9
    assert again.watch == state.watch
    for ours, theirs in zip(again[:4], state[:4], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_nothing_that_is_given_is_written_to():
    q = Quadratic()
    method = q.method()
    y, x = torch.tensor(q.y0), torch.tensor(q.x0)
    state = method.start({"y": y}, {"x": x})
    copies = [{name: value.clone() for name, value in part.items()} for part in state[:4]]
    later, _ = method.step(method.refine(state, NOTHING, steps=2), NOTHING, NOTHING)
    for part, copy in zip(state[:4], copies, strict=True):
        assert all(torch.equal(part[name], copy[name]) for name in copy)
    assert np.array_equal(y.numpy(), q.y0)
    assert not any(v.requires_grad for part in later[:4] for v in part.values())
    refined = method.refine(state, NOTHING, steps=200).inner["y"].numpy()
    np.testing.assert_allclose(refined, np.linalg.solve(q.A, q.B @ q.x0 + q.c), atol=1e-6)
    averaged = method.refine(state, NOTHING, steps=8, epochs=6, lr=0.5).inner["y"].numpy()
    assert np.linalg.norm(averaged - refined) < 0.1 * np.linalg.norm(q.y0 - refined)


def test_half_precision_parameters_have_wide_states():
    method = SingleLoopBilevel(
        lambda y, x, _: (y["y"] - x["x"]).square().sum() / 2,
        lambda y, x, _: (y["y"] - 1).square().sum() / 2,
        lr=0.1,
        inner_lr=0.5,
        z_lr=0.5,
    )
    start = torch.full((2,), -2.0, dtype=torch.bfloat16)
    state = method.start({"y": start}, {"x": start.clone()})
    for _ in range(3):
        state, _ = method.step(state, NOTHING, NOTHING)
    assert {v.dtype for part in (state.inner, state.outer) for v in part.values()} == {torch.bfloat16}
    assert {v.dtype for part in (state.z, state.m) for v in part.values()} == {torch.float32}
    assert (state.outer["x"] > -2).all()
