"""Several tasks with one set of outer parameters, against steps of single tasks that are put together by hand."""

from itertools import count, repeat

import pytest
import torch
from torch.nn import functional as F

from lightning_hpo.functional.bilevel.bo_rep import SingleLoopBilevel
from lightning_hpo.functional.bilevel.bo_rep_tasks import SingleLoopTasks, TasksState
from lightning_hpo.functional.bilevel.outer_gradient import outer_gradient
from lightning_hpo.functional.bilevel.problem import Problem

TASKS = ("a", "b", "c")


def data(task, part):
    """Inputs and targets; each task has weights of its own."""
    generator = torch.Generator().manual_seed(TASKS.index(task) + 10 * (part == "val"))
    inputs = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return inputs, inputs @ torch.tensor([1.0, -1.0, 0.5]).double() * (1 + TASKS.index(task))


def outer_loss(y, x, batch):
    inputs, targets = batch
    return (torch.tanh(inputs @ x["encoder"]) @ y["head"] - targets).square().mean()


def inner_loss(y, x, batch):
    return outer_loss(y, x, batch) + 0.1 * y["head"].square().sum()


def start():
    generator = torch.Generator().manual_seed(5)
    encoder = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    heads = {task: {"head": torch.randn(4, generator=generator, dtype=torch.float64)} for task in TASKS}
    return heads, {"encoder": encoder}


def settings(**more):
    return {"lr": 0.05, "inner_lr": 0.1, "z_lr": 0.2, "interval": 2, "inner_steps": 3, **more}


def batches(part, tasks=TASKS):
    return {task: repeat(data(task, part)) for task in tasks}


def by_hand(visits, interval=2, inner_steps=3, radius=float("inf")):
    """Each visit: inner steps and a hypergradient of each task alone, and then one normalised step."""
    heads, x = start()
    z = dict.fromkeys(TASKS)
    done, m = dict.fromkeys(TASKS, 0), torch.zeros(3, 4, dtype=torch.float64)
    for tasks in visits:
        found = []
        for task in tasks:
            if done[task] and done[task] % interval == 0:
                begin = heads[task]["head"]
                for _ in range(inner_steps):
                    head = heads[task]["head"].requires_grad_()
                    (slope,) = torch.autograd.grad(inner_loss({"head": head}, x, data(task, "train")), head)
                    head = head.detach() - 0.1 * slope
                    apart = (head - begin).norm().item()
                    heads[task] = {"head": begin.detach() + (head - begin.detach()) * min(1.0, radius / apart)}
            problem = Problem(
                lambda y, p, task=task: inner_loss(y, p, data(task, "train")),
                lambda y, p, task=task: outer_loss(y, p, data(task, "val")),
            )
            one = outer_gradient(problem, heads[task], x, z[task], z_lr=0.2)
            z[task] = one.z
            found.append(one.gradients["encoder"])
            done[task] += 1
        m = 0.9 * m + 0.1 * sum(found) / len(found)
        x = {"encoder": x["encoder"] - 0.05 * m / m.norm()}
    return heads, x, z, m, done


@pytest.mark.parametrize("radius", [float("inf"), 0.02])
@pytest.mark.parametrize("visits", [[TASKS] * 7, ["ab", "c", "ca", "abc", "b", "ac", "abc"]], ids=["all", "some"])
def test_steps_are_those_of_single_tasks_put_together(visits, radius):
    tasks = SingleLoopTasks(SingleLoopBilevel(inner_loss, outer_loss, **settings(radius=radius)))
    state = tasks.start(*start())
    for visited in visits:
        state, info = tasks.step(state, batches("train", visited), batches("val", visited))
        assert not info.skipped
    heads, x, z, m, done = by_hand(visits, radius=radius)
    torch.testing.assert_close(state.outer, x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state.m["encoder"], m, rtol=1e-12, atol=1e-13)
    for task in TASKS:
        torch.testing.assert_close(state.inner[task]["head"], heads[task]["head"].detach(), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(state.z[task], z[task], rtol=1e-12, atol=1e-13)
    assert state.steps == done


def test_one_task_is_the_method_without_tasks():
    method = SingleLoopBilevel(inner_loss, outer_loss, **settings())
    tasks, (heads, x) = SingleLoopTasks(method), start()
    several, alone = tasks.start({"a": heads["a"]}, x), method.start(heads["a"], x)
    train, val = batches("train", "a"), batches("val", "a")
    several, alone = tasks.refine(several, train, steps=3), method.refine(alone, train["a"], steps=3)
    for _ in range(6):
        several, found = tasks.step(several, train, val)
        alone, known = method.step(alone, train["a"], val["a"])
        assert found == pytest.approx(known, rel=1e-12)
    torch.testing.assert_close(several.outer, alone.outer, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(several.z["a"], alone.z, rtol=1e-13, atol=1e-14)


def test_tasks_are_one_problem_with_all_heads_as_inner_parameters():
    """Sum of inner losses and mean of outer ones: how a module with a head for each task has it. z is divided by T."""

    def joint(loss, mean):
        def value(y, x, batch):
            values = [loss({"head": y[task]}, x, batch[task]) for task in TASKS]
            return torch.stack(values).mean() if mean else torch.stack(values).sum()

        return value

    heads, x = start()
    one = SingleLoopBilevel(joint(inner_loss, mean=False), joint(outer_loss, mean=True), **settings())
    together = one.start({task: heads[task]["head"] for task in TASKS}, x)
    tasks = SingleLoopTasks(SingleLoopBilevel(inner_loss, outer_loss, **settings()))
    state = tasks.start(heads, x)
    every = [repeat({task: data(task, part) for task in TASKS}) for part in ("train", "val")]
    for _ in range(7):
        together, _ = one.step(together, *every)
        state, _ = tasks.step(state, batches("train"), batches("val"))
    torch.testing.assert_close(together.outer, state.outer, rtol=1e-12, atol=1e-13)
    for task in TASKS:
        torch.testing.assert_close(together.inner[task], state.inner[task]["head"], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(3 * together.z[task], state.z[task]["head"], rtol=1e-12, atol=1e-13)


def test_what_is_reported_is_mean_and_root_mean_square_over_tasks():
    tasks = SingleLoopTasks(SingleLoopBilevel(inner_loss, outer_loss, **settings()))
    heads, x = start()
    _, info = tasks.step(tasks.start(heads, x), batches("train"), batches("val"))
    losses = torch.stack([outer_loss(heads[task], x, data(task, "val")) for task in TASKS])
    slopes = []
    for task in TASKS:
        head = heads[task]["head"].detach().requires_grad_()
        slopes.append(torch.autograd.grad(outer_loss({"head": head}, x, data(task, "val")), head)[0])
    assert info.outer_loss == pytest.approx(losses.mean().item(), rel=1e-12)
    assert info.z_norm == pytest.approx(0.2 * torch.stack(slopes).square().sum(1).mean().sqrt().item(), rel=1e-12)
    assert info.residual == pytest.approx(1.0)  # z was 0
    assert info.momentum_norm == pytest.approx(0.1 * info.gradient_norm, rel=1e-12)


def test_two_ranks_are_one_process(ranks):
    def run(reduce, rows):
        def part(name):
            return {task: repeat(tuple(p[rows] for p in data(task, name))) for task in TASKS}

        tasks = SingleLoopTasks(SingleLoopBilevel(inner_loss, outer_loss, **settings(reduce=reduce)))
        state = tasks.start(*start())
        for _ in range(5):
            state, _ = tasks.step(state, part("train"), part("val"))
        return state

    single = run(lambda vector: vector, slice(None))
    first, second = ranks.run(lambda rank, reduce: run(reduce, slice(4 * rank, 4 * rank + 4)))
    assert torch.equal(first.outer["encoder"], second.outer["encoder"])
    torch.testing.assert_close(first.outer, single.outer, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(first.z, single.z, rtol=1e-12, atol=1e-13)


def test_a_shared_encoder_is_learned_and_a_new_task_adapts():
    """Four tasks classify points by their angle in one plane of six dimensions; x learns to look at that plane."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(6, 2, generator=generator))[0]

    def draw(angle):
        while True:
            inputs = torch.randn(20, 6, generator=generator)
            direction = torch.tensor([torch.cos(angle), torch.sin(angle)])
            yield inputs, (inputs @ plane @ direction > 0).long()

    def outer(y, x, batch):
        return F.cross_entropy(batch[0] @ x["encoder"] @ y["head"], batch[1])

    def inner(y, x, batch):
        return outer(y, x, batch) + 0.01 * y["head"].square().sum()

    angles = {str(i): torch.tensor(0.8 * i) for i in range(4)}
    train, val = ({name: draw(angle) for name, angle in angles.items()} for _ in range(2))
    tasks = SingleLoopTasks(SingleLoopBilevel(inner, outer, lr=0.05, inner_lr=0.3, z_lr=0.3))
    begin = {"encoder": torch.randn(6, 2, generator=generator) / 2}
    state = tasks.start({name: {"head": torch.zeros(2, 2)} for name in angles}, begin)
    state = tasks.refine(state, train, steps=20)
    for _ in range(300):
        state, _ = tasks.step(state, train, val)
    new = torch.tensor(4.0)
    query = [torch.cat(parts) for parts in zip(*(next(draw(new)) for _ in range(10)), strict=True)]
    scores = []
    for x in (begin, state.outer):
        head = tasks.adapt({"head": torch.zeros(2, 2)}, x, draw(new), steps=100)
        scores.append(((query[0] @ x["encoder"] @ head["head"]).argmax(1) == query[1]).double().mean().item())
    assert scores[1] > 0.9
    assert scores[1] > scores[0] + 0.05


def test_a_state_goes_through_a_file(tmp_path):
    tasks = SingleLoopTasks(SingleLoopBilevel(inner_loss, outer_loss, **settings()))
    state = tasks.start(*start())
    for _ in range(3):
        state, _ = tasks.step(state, batches("train", "ab"), batches("val", "ab"))
    torch.save(state._asdict(), tmp_path / "state.pt")
    again = TasksState(**torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        state, _ = tasks.step(state, batches("train"), batches("val"))
        again, _ = tasks.step(again, batches("train"), batches("val"))
    assert torch.equal(again.outer["encoder"], state.outer["encoder"])
    assert again.steps == state.steps == {"a": 6, "b": 6, "c": 3}


def test_one_task_that_is_not_finite_leaves_everything_where_it_is():
    bad = count()

    def broken(y, x, batch):
        return outer_loss(y, x, batch) * (float("inf") if next(bad) == 1 else 1.0)

    tasks = SingleLoopTasks(SingleLoopBilevel(inner_loss, broken, **settings()))
    begin = tasks.start(*start())
    state, info = tasks.step(begin, batches("train"), batches("val"))
    assert info.skipped
    assert torch.equal(state.outer["encoder"], begin.outer["encoder"])
    assert all(not value["head"].any() for value in state.z.values())
    state, info = tasks.step(state, batches("train"), batches("val"))
    assert not info.skipped


def test_tasks_that_do_not_fit_are_listed():
    tasks = SingleLoopTasks(SingleLoopBilevel(inner_loss, outer_loss, **settings()))
    state = tasks.start(*start())
    with pytest.raises(ValueError, match="'d' is no task: .*; 'd' has no training batches; 'b' has no validation"):
        tasks.step(state, batches("train", "ab"), {**batches("val", "a"), "d": repeat(None)})
    with pytest.raises(ValueError, match="no task is visited"):
        tasks.step(state, {}, {})
    with pytest.raises(ValueError, match="at least one task"):
        tasks.start({}, start()[1])
    shared = torch.zeros(2)
    with pytest.raises(ValueError, match="overlap: 'head' is the outer 'encoder'"):
        tasks.start({"a": {"head": shared}}, {"encoder": shared})


def test_a_step_of_z_that_is_too_large_names_the_curvature_of_the_worst_task():
    def steep(y, x, batch):
        return 10 * inner_loss(y, x, batch)

    tasks = SingleLoopTasks(SingleLoopBilevel(steep, outer_loss, **settings(z_lr=1.0, inner_lr=0.01)))
    with pytest.warns(UserWarning, match=r"z_lr \(nu\) is 1, but must stay below"):
        run(tasks, 8)


def run(tasks, steps):
    state = tasks.start(*start())
    for _ in range(steps):
        state, _ = tasks.step(state, batches("train"), batches("val"))
