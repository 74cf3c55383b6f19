"""Training under sampled conditions: what is drawn, on ranks and after a break; what is chosen; what is refused."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo import ConditionedTraining, ConditionSpec, MicroBatchFinder, hypernetize
from lightning_hpo.functional.bilevel.condition_draws import sample_conditions
from lightning_hpo.testing import TinyClassifier, TinyImages, check_resume, fit, fit_two_ranks, tiny_trainer
from lightning_hpo.testing.checkpoints import kill_and_resume
from lightning_hpo.testing.compare import assert_same


class Echo(LightningModule):
    """Its training loss is the condition, its validation loss a parabola around 0.37 of the range from -1 to 1."""

    def __init__(self, spec=None):
        super().__init__()
        self.net = hypernetize(nn.Linear(1, 1), spec or ConditionSpec().add("x", -1.0, 1.0), hidden=(4,))
        self.seen = []

    def see(self):
        self.seen.append({name: value.detach().clone() for name, value in self.net.condition.items()})

    def training_step(self, batch, batch_idx):
        self.see()
        return self.net(torch.ones(1, 1)).sum() * 0 + self.net.condition["x"].mean()

    def validation_step(self, batch, batch_idx):
        self.see()
        self.log("val_loss", (self.net.condition["x"] - (2 * 0.37 - 1)) ** 2, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net.condition["x"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Family(TinyClassifier):
    """A classifier whose head follows how much labels are smoothed; scored without smoothing."""

    def __init__(self):
        super().__init__(depth=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            spec = ConditionSpec().add("smoothing", 0.0, 0.5)
            self.network = hypernetize(self.network, spec, include=("head.*",), hidden=(8,))

    def training_step(self, batch, batch_idx):
        logs, share = self(batch[0]).log_softmax(1), self.network.condition["smoothing"]
        return ((share - 1) * logs.gather(1, batch[1][:, None])[:, 0] - share * logs.mean(1)).mean()


def numbers(*arguments, **keywords):
    return 2 * sample_conditions(range(*arguments), 1, **keywords)[:, 0] - 1


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_micro_batch_has_a_condition_of_its_own(sampling, accumulate):
    training = ConditionedTraining(sampling, grid=0, seed=5)
    outcome = fit(training, Echo(), TinyImages(), max_steps=12 // accumulate, accumulate_grad_batches=accumulate)
    expected = numbers(12, seed=5, stratified=sampling == "stratified")
    torch.testing.assert_close(torch.tensor(outcome.losses) * accumulate, expected)
    assert training.draws == 12


def test_each_example_may_have_one():
    class Each(Echo):
        def training_step(self, batch, batch_idx):
            self.see()
            return self.net(torch.ones(8, 1)).sum()

    module, training = Each(), ConditionedTraining(per_example=True, grid=0)
    fit(training, module, TinyImages(), max_steps=3)
    drawn = torch.cat([seen["x"] for seen in module.seen if seen["x"].ndim])
    torch.testing.assert_close(drawn, numbers(24))
    assert training.draws == 24


def test_ranks_share_out_the_draws():
    first, second = fit_two_ranks(lambda: ConditionedTraining(grid=0), Echo, TinyImages, batch_size=4, max_steps=6)
    assert first.method == second.method == {"draws": 12, "chosen": {}, "losses": []}
    drawn = torch.tensor([first.losses, second.losses]).T.flatten()
    torch.testing.assert_close(drawn, numbers(12))
    assert_same(first.module, second.module, "weights")


def test_ranks_choose_alike_on_all_validation_data():
    def make():
        return ConditionedTraining(grid=3, refine_steps=3)

    first, second = fit_two_ranks(make, Family, TinyImages, batch_size=4, max_epochs=1)
    assert_same(first.method, second.method, "what ranks choose")
    assert_same(first.module, second.module, "weights")
    method = ConditionedTraining(grid=3, condition={"smoothing": 0.1})
    module = Family()
    module.load_state_dict(first.module)
    tiny_trainer(method).validate(module, TinyImages(8), verbose=False)
    assert_same(method.losses, first.method["losses"], "losses of the grid", rtol=1e-5, atol=1e-6)


def test_micro_batches_of_examples_end_like_one_batch():
    def make():
        return ConditionedTraining(per_example=True, grid=0)

    split = fit(make(), Family(), TinyImages(4), max_steps=5, accumulate_grad_batches=2)
    whole = fit(make(), Family(), TinyImages(8), max_steps=5)
    assert_same(split.method, whole.method, "draws")
    assert_same(split.module, whole.module, "weights", rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kill",
    [{"kill_at": 1}, {"kill_at": 4}, {"kill_at": 9}, {"kill_at": 5, "accumulate_grad_batches": 2}],
    ids=["first step", "mid-epoch", "mid second epoch", "mid-window"],
)
@pytest.mark.parametrize("per_example", [False, True])
def test_resumes_bit_for_bit(kill, per_example):
    check_resume(lambda: ConditionedTraining(per_example=per_example, grid=4), Family, TinyImages, steps=14, **kill)


def test_a_break_before_a_validation_costs_its_choice_alone():
    whole, _, resumed = kill_and_resume(ConditionedTraining, Family, TinyImages, steps=10, kill_at=6)
    assert whole.method["draws"] == resumed.method["draws"] == 10
    assert whole.method["chosen"]
    assert not resumed.method["chosen"]
    for what in ("module", "optimizers"):
        assert_same(getattr(whole, what), getattr(resumed, what), what)
    assert_same(whole.losses[-4:], resumed.losses, "losses")


def test_the_grid_holds_the_losses_of_its_conditions_and_the_best_is_chosen():
    module, training, data = Family(), ConditionedTraining(grid=5), TinyImages(6)  # 6, 6 and 4 images
    trainer = tiny_trainer(training, max_epochs=2)
    trainer.fit(module, data)
    images, labels = data.val_set.tensors if hasattr(data.val_set, "tensors") else data.val_set[:]
    module.eval()
    with torch.no_grad():
        expected = [
            F.cross_entropy(module.network(images, gamma=torch.tensor([g / 4])), labels).item() for g in range(5)
        ]
    assert training.losses == pytest.approx(expected, rel=1e-5)
    best = min(range(5), key=expected.__getitem__)
    assert training.chosen == training.hyperparameters() == {"smoothing": pytest.approx(best / 8)}
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    for index, loss in enumerate(expected):
        assert logged[f"mip_hypernetworks/val_loss/smoothing_{index / 8:.4g}"] == pytest.approx(loss, rel=1e-5)
    assert logged["mip_hypernetworks/val_loss"] == pytest.approx(min(expected), rel=1e-5)
    assert logged["mip_hypernetworks/chosen_smoothing"] == training.chosen["smoothing"]
    assert 0 <= logged["mip_hypernetworks/smoothing"] < 0.5
    assert module.network.gamma is None


def test_what_is_chosen_is_used_and_what_is_given_wins():
    for condition, expected in ((None, -0.25), ({"x": 0.5}, 0.5)):
        module, training = Echo(), ConditionedTraining(grid=9, condition=condition)
        assert training.hyperparameters() == {}
        trainer = tiny_trainer(training, max_epochs=1, num_sanity_val_steps=1)
        trainer.fit(module, TinyImages())
        first = module.seen[0]["x"].item()  # in the sanity check: nothing is chosen yet
        assert first == pytest.approx(0.0 if condition is None else 0.5)
        assert training.chosen == {"x": pytest.approx(-0.25)}  # of -1, -0.75 and so on, the closest to -0.26
        assert training.losses == pytest.approx([(g / 4 + 0.26) ** 2 for g in range(-4, 5)], abs=1e-7)
        trainer.test(module, DataLoader(torch.zeros(4, 1), 2), verbose=False)
        assert module.seen[-1]["x"].item() == pytest.approx(expected)
        found = trainer.predict(module, DataLoader(torch.zeros(2, 1), 2))
        assert found[0].item() == pytest.approx(expected)
        assert module.net.gamma is None


def test_a_list_of_conditions_is_a_grid():
    training = ConditionedTraining(grid=[{"x": 0.9}, {"x": -0.5}])
    fit(training, Echo(), TinyImages(), max_epochs=1)
    assert training.chosen == {"x": pytest.approx(-0.5)}
    assert training.losses == pytest.approx([1.16**2, 0.24**2])


@pytest.mark.parametrize("grid", [1, 21])
def test_the_choice_is_refined_to_the_optimum(grid):
    training = ConditionedTraining(grid=grid, refine_steps=100)
    fit(training, Echo(), TinyImages(), max_epochs=1)
    assert training.chosen["x"] == pytest.approx(-0.26, abs=0.01)
    assert len(training.losses) == grid


def test_it_is_refined_through_the_weights():
    """The hyper-network learns y = gamma; validation wants 0.37, which is between two points of the grid."""

    class Constant(Echo):
        def training_step(self, batch, batch_idx):
            target = (self.net.condition["x"] + 1) / 2
            return (self.net(torch.ones(target.shape[0], 1))[:, 0] - target).square().mean()

        def validation_step(self, batch, batch_idx):
            return (self.net(torch.ones(1, 1)) - 0.37).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    torch.manual_seed(0)
    module, training = Constant(), ConditionedTraining(per_example=True, grid=21, refine_steps=100)
    weights = {}
    module.on_train_end = lambda: weights.update({n: p.clone() for n, p in module.named_parameters()})
    fit(training, module, TinyImages(), max_epochs=60)
    curve = [
        (module.net(torch.ones(1, 1), gamma=g) - 0.37).square().item() for g in torch.linspace(0, 1, 1001)[:, None]
    ]
    optimum = curve.index(min(curve)) / 1000
    assert optimum == pytest.approx(0.37, abs=0.03)
    assert (training.chosen["x"] + 1) / 2 == pytest.approx(optimum, abs=0.01)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in module.named_parameters())
    assert all(parameter.grad is None or parameter.requires_grad for parameter in module.parameters())


def test_a_refined_choice_is_kept_while_nothing_on_the_grid_is_better(tmp_path):
    module, training = Echo(), ConditionedTraining(grid=5, refine_steps=100)
    trainer = tiny_trainer(training, max_epochs=1)
    trainer.fit(module, TinyImages())
    refined, on_grid = training.chosen, training.losses
    assert refined["x"] == pytest.approx(-0.26, abs=0.01)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other = ConditionedTraining(grid=5)
    tiny_trainer(other).validate(Echo(), TinyImages(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    (logged,) = trainer.validate(module, TinyImages(), verbose=False)
    assert training.chosen == other.chosen == refined
    assert training.losses == other.losses == on_grid
    assert logged["mip_hypernetworks/val_loss"] == pytest.approx((refined["x"] + 0.26) ** 2, abs=1e-6)
    module.validation_step = lambda batch, batch_idx: (module.net.condition["x"] - 0.5).square()
    trainer.validate(module, TinyImages(), verbose=False)
    assert training.chosen == {"x": 0.5}


def test_a_loss_without_a_gradient_costs_the_refinement_alone():
    class Detached(Echo):
        def validation_step(self, batch, batch_idx):
            return ((self.net.condition["x"] + 0.26) ** 2).detach()

    training = ConditionedTraining(grid=5, refine_steps=2)
    text = "The choice is the best of the grid, because the validation loss has no gradient in the condition"
    with pytest.warns(UserWarning, match=text):
        fit(training, Detached(), TinyImages(), max_epochs=1)
    assert training.chosen == {"x": -0.5}
    assert len(training.losses) == 5


def test_a_gradient_that_is_not_finite_costs_the_refinement_alone():
    class Cusp(Echo):
        def validation_step(self, batch, batch_idx):
            return self.net.condition["x"].abs().sqrt()

    training = ConditionedTraining(grid=5, refine_steps=2)
    text = "The choice is the best of the grid, because a gradient in the condition was not finite"
    with pytest.warns(UserWarning, match=text):
        fit(training, Cusp(), TinyImages(), max_epochs=1)
    assert training.chosen == {"x": 0.0}


def test_a_refinement_that_ends_worse_is_not_taken():
    training = ConditionedTraining(grid=9, refine_steps=1, lr=1.0)  # one step to the end of the range
    fit(training, Echo(), TinyImages(), max_epochs=1)
    assert training.chosen == {"x": pytest.approx(-0.25)}


def test_conditions_close_together_are_logged_apart():
    training = ConditionedTraining(grid=3, val_loss=lambda module, batch: module.net.condition["x"])
    trainer = tiny_trainer(training, max_epochs=1)
    trainer.fit(Echo(ConditionSpec().add("x", 1000.0, 1000.1)), TinyImages())
    assert len([name for name in trainer.callback_metrics if "mip_hypernetworks/val_loss/" in name]) == 3


def test_categories_are_chosen_but_not_refined():
    spec = ConditionSpec().add("task", categories=3).add("x", -1.0, 1.0)

    class Tasks(Echo):
        def validation_step(self, batch, batch_idx):
            values = self.net.condition
            return (values["x"] + 0.26) ** 2 + (values["task"] - 1) ** 2 + 0 * self.net(torch.ones(1, 1)).sum()

    training = ConditionedTraining(grid=3, refine_steps=100)
    fit(training, Tasks(spec), TinyImages(), max_epochs=1)
    assert training.chosen == {"task": 1, "x": pytest.approx(-0.26, abs=0.01)}
    assert len(training.losses) == 9


def test_losses_that_are_not_finite_are_not_chosen():
    class Broken(Echo):
        def validation_step(self, batch, batch_idx):
            x = self.net.condition["x"]
            self.log("val_loss", torch.where(x < self.least, math.nan, (x + 0.26) ** 2))

    module, training = Broken(), ConditionedTraining(grid=5)
    module.least = -0.2
    trainer = tiny_trainer(training, max_epochs=1)
    trainer.fit(module, TinyImages())
    assert training.chosen == {"x": 0.0}
    assert math.isnan(training.losses[0])
    assert trainer.callback_metrics["mip_hypernetworks/val_loss"].item() == pytest.approx(0.26**2)
    module.least = 2.0
    with pytest.warns(UserWarning, match="No validation loss was finite on the grid; the chosen condition stays"):
        fit(training, module, TinyImages(), max_epochs=1)
    assert training.chosen == {"x": 0.0}


def test_another_module_begins_from_the_beginning():
    training, module = ConditionedTraining(), Family()
    fit(training, module, TinyImages(), max_steps=6, limit_val_batches=0)
    assert (training.draws, training.chosen) == (6, {})
    fit(training, module, TinyImages(), max_epochs=1)
    assert training.draws == 12
    assert training.chosen
    fit(training, Family(), TinyImages(), max_steps=2)
    assert (training.draws, training.chosen, training.losses) == (2, {}, [])


def test_parts_with_the_same_conditions_get_the_same():
    module = Echo()
    module.other = hypernetize(nn.Linear(1, 1), ConditionSpec().add("x", -1.0, 1.0))
    step, found = module.training_step, []
    module.training_step = lambda *a: found.append((module.net.gamma, module.other.gamma)) or step(*a)
    fit(ConditionedTraining(grid=0), module, TinyImages(), max_steps=3)
    assert len(found) == 3
    assert all(torch.equal(*pair) for pair in found)


def test_a_step_may_be_tried_before_the_first():
    module, finder = Family(), MicroBatchFinder(max_size=8)
    fit(ConditionedTraining(grid=0), module, TinyImages(), finder, max_steps=1)
    assert finder.micro_batch_size == 8


def test_an_exception_takes_the_condition_back():
    module = Echo()
    fit(ConditionedTraining(), module, TinyImages(), max_steps=6, kill_at=2)
    assert module.net.gamma is None


# Refusals


def test_wrong_arguments_are_all_listed():
    with pytest.raises(ValueError) as error:
        ConditionedTraining("sobol", grid=-1, refine_steps=1.5, lr=0, seed=-1)
    for part in ("sampling must", "grid must", "refine_steps must", "lr must", "seed must"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="refine_steps needs a grid to begin from"):
        ConditionedTraining(grid=0, refine_steps=1)
    with pytest.raises(ValueError) as error:
        ConditionedTraining(grid=0, condition=0.5, val_loss=3, val_dataloader=[])
    for part in (
        "condition must be values by name, got 0.5",
        "val_dataloader is what the choice is refined on; give refine_steps, too",
        "val_loss must be a function or a name, got 3",
        "val_loss scores the grid; give one",
    ):
        assert part in str(error.value)
    for grid in ([], [0.5], True):
        with pytest.raises(ValueError, match="grid must be an integer of at least 0, or a list of conditions"):
            ConditionedTraining(grid=grid)


def many(count):
    spec = ConditionSpec()
    for number in range(count):
        spec.add(f"x{number}")
    return spec


class Unscored(Echo):
    validation_step = LightningModule.validation_step


@pytest.mark.parametrize(
    ("arguments", "module", "text"),
    [
        (
            {},
            TinyClassifier,
            r"no part of `TinyClassifier` is hypernetized; make one: `net = hypernetize\(net, spec\)`",
        ),
        ({}, Unscored, "nothing scores a validation batch: define `validation_step`, or give `val_loss`"),
        ({"grid": [{"y": 0.5}]}, Echo, r"in `grid`, there is no condition `y`, but \['x'\]; `x` is missing"),
        ({"condition": {"x": 3.0}}, Echo, "in `condition`, `x` must be from -1 to 1, got 3"),
        ({"grid": 1001}, Echo, "the grid has 1001 conditions; use fewer values each"),
        ({}, lambda: Echo(many(40)), f"the grid has {5**40} conditions"),
        ({"grid": [{"x": torch.zeros(2)}]}, Echo, r"in `grid`, one number is needed for each name, got {'x': tensor"),
        (
            {"refine_steps": 1},
            lambda: Echo(ConditionSpec().add("x", categories=2)),
            "`refine_steps` moves ranges, and all conditions are categories; leave it out",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_what_cannot_be_trained_is_refused(arguments, module, text):
    with pytest.raises(MisconfigurationException, match=text):
        fit(ConditionedTraining(**arguments), module(), TinyImages(), max_steps=1)


def test_different_conditions_are_refused():
    module = Echo()
    module.other = hypernetize(nn.Linear(1, 1), ConditionSpec().add("x"))
    with pytest.raises(MisconfigurationException, match="different conditions; give them the same `ConditionSpec`"):
        fit(ConditionedTraining(), module, TinyImages(), max_steps=1)


def test_there_must_be_data_to_refine_on():
    with pytest.raises(MisconfigurationException, match="there are no validation data"):
        fit(ConditionedTraining(refine_steps=1), Echo(), TinyImages(), max_steps=1, limit_val_batches=0)


def test_a_loss_must_be_found_and_a_batch_have_a_length():
    with pytest.raises(MisconfigurationException, match=r"`validation_step` logs no `other`, but \['val_loss'\]"):
        fit(ConditionedTraining(val_loss="other"), Echo(), TinyImages(), max_epochs=1)
    plain = [DataLoader([1, 2], batch_size=None)] * 2
    with pytest.raises(MisconfigurationException, match="a batch without a tensor has no number of samples"):
        tiny_trainer(ConditionedTraining(per_example=True, grid=0), max_steps=1, num_sanity_val_steps=0).fit(
            Echo(), *plain
        )


def test_a_checkpoint_of_other_conditions_is_refused(tmp_path):
    trainer = tiny_trainer(ConditionedTraining(), max_epochs=1)
    trainer.fit(Echo(), TinyImages())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    other = Echo(ConditionSpec().add("y", -1.0, 1.0))
    with pytest.raises(MisconfigurationException, match=r"the checkpoint chose \['x'\], the module has \['y'\]"):
        fit(ConditionedTraining(), other, TinyImages(), max_epochs=2, ckpt_path=tmp_path / "end.ckpt")
    narrow = Echo(ConditionSpec().add("x", 0.5, 1.0))
    text = "the checkpoint's choice does not fit the module: `x` must be from 0.5 to 1, got "
    with pytest.raises(MisconfigurationException, match=text):
        fit(ConditionedTraining(), narrow, TinyImages(), max_epochs=2, ckpt_path=tmp_path / "end.ckpt")


def test_parameters_that_also_stand_elsewhere_are_warned_of():
    class Twice(Echo):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(1, 1)
            self.net = hypernetize(nn.Sequential(self.plain), ConditionSpec().add("x", -1.0, 1.0), hidden=(4,))

    text = r"\['plain.weight', 'plain.bias'\] are also predicted by a hypernetized part, and never change here"
    with pytest.warns(UserWarning, match=text):
        fit(ConditionedTraining(grid=0), Twice(), TinyImages(), max_steps=1)
    again = Echo()
    again.other = again.net  # the same part under two names
    fit(ConditionedTraining(grid=0), again, TinyImages(), max_steps=1)


def test_a_loader_without_a_length_is_refined_on():
    data = DataLoader(TensorDataset(torch.zeros(4, 1)), 2)

    class Stream:
        def __iter__(self):
            return iter(data)

    training = ConditionedTraining(grid=3, refine_steps=100, val_dataloader=Stream())
    tiny_trainer(training, max_steps=2).fit(Echo(), data, data)
    assert training.chosen["x"] == pytest.approx(-0.26, abs=0.01)
