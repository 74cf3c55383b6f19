"""What is particular to pruning: when, on what, and what it says."""

import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch_geometric.loader import DataLoader, RandomNodeLoader

from lightning_hpo import CommunityPruning, DAGCommunityDetector, GraphDegree
from lightning_hpo.demos.graph_data import planted_partition
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*still dying when training ended")


def detector(**arguments):
    small = {"max_communities": 8, "hidden_channels": 16, "heads": 2, "warmup_epochs": 2, "ramp_epochs": 2, "lr": 0.01}
    return DAGCommunityDetector(16, **{**small, **arguments})


def fit(callback, model=None, loader=None, epochs=10, **trainer):
    model = detector() if model is None else model
    loader = DataLoader([planted_partition(3, 20)]) if loader is None else loader
    tiny_trainer(callback, max_epochs=epochs, **trainer).fit(model, loader)
    return model


def test_it_prunes_after_its_warm_up_every_so_many_epochs():
    callback = CommunityPruning(warmup=2, every=3)
    fit(callback, epochs=12)  # the search is of epochs 3 to 12: prunings after its 5th and 8th
    assert len(callback.history) == 2
    assert sorted(callback.hyperparameters()) == ["k_eff", "n_communities"]
    assert callback.found.keys() == {"n_communities", "k_eff", "modularity", "row_entropy"}


def test_columns_without_nodes_die_and_the_number_is_that_of_the_nodes_choices():
    callback = CommunityPruning(warmup=0, every=1, min_size=4)
    model = fit(callback, epochs=6)
    result = model.predict_communities(planted_partition(3, 20))
    assert result.n_communities == callback.found["n_communities"]
    assert model.readout.live.sum() < 8
    assert callback.history == sorted(callback.history, reverse=True)


def test_by_default_the_module_brings_its_own():
    trainer = tiny_trainer(max_epochs=1)
    with pytest.warns(UserWarning, match="nothing is pruned in 1 epochs: 2 of reconstruction, 50 of the search and 5"):
        trainer.fit(detector(), DataLoader([planted_partition(3, 20)]))
    assert sum(isinstance(c, CommunityPruning) for c in trainer.callbacks) == 1
    mine = CommunityPruning(warmup=0, every=1)
    trainer = tiny_trainer(mine, max_epochs=4)
    trainer.fit(detector(), DataLoader([planted_partition(3, 20)]))
    assert [c for c in trainer.callbacks if isinstance(c, CommunityPruning)] == [mine]


@pytest.mark.parametrize(
    ("limits", "epochs", "every"),
    [({"max_epochs": 5}, 5, 2), ({"max_epochs": 60, "max_steps": 3}, 3, 2), ({"max_epochs": -1, "max_steps": 4}, 4, 1)],
)
def test_training_too_short_for_a_pruning_is_warned_of(limits, epochs, every):
    callback = CommunityPruning(warmup=2, every=every)  # the first comes after 2 + 2 + `every` epochs
    with pytest.warns(
        UserWarning, match=f"nothing is pruned in {epochs} epochs: 2 .*, 2 of the search and {every} more"
    ):
        tiny_trainer(callback, **limits).fit(detector(), DataLoader([planted_partition(3, 20)]))
    assert callback.history == []


def test_training_just_long_enough_for_a_pruning_is_not():
    callback = CommunityPruning(warmup=2, every=2)
    graphs = [planted_partition(3, 20, seed=seed) for seed in range(4)]
    fit(callback, loader=DataLoader(graphs), epochs=-1, max_steps=12, accumulate_grad_batches=2)  # 6 epochs
    assert len(callback.history) == 1


def test_an_epoch_that_was_cut_short_is_not_counted_with_the_next():
    graph = GraphDegree()(planted_partition(3, 40))
    model, loader, callback = detector(warmup_epochs=0), RandomNodeLoader(graph, num_parts=4), Counted(0, 2)
    tiny_trainer(callback, max_steps=6).fit(model, loader)  # an epoch and a half
    tiny_trainer(callback, max_epochs=3).fit(model, loader)
    assert callback.nodes == [120] * 2  # after the second and fourth epoch of the search, each has seen every node once


class Counted(CommunityPruning):
    """Notes how many nodes each pruning has seen."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.nodes = []

    def _prune(self, model):
        self.nodes.append(int(self.sums[2][-1].sum()))
        super()._prune(model)


def test_parts_are_added_up_before_the_decision():
    graph = GraphDegree()(planted_partition(3, 40))
    callback = CommunityPruning(warmup=0, every=1, min_size=30)
    model = fit(callback, detector(warmup_epochs=1), RandomNodeLoader(graph, num_parts=4, shuffle=True), epochs=6)
    # A part has 30 nodes and no community of 30: the graph has.
    assert model.predict_communities(graph).n_communities > 1
    assert callback.sums == []


def test_blurred_memberships_are_warned_of():
    callback = CommunityPruning(warmup=0, every=1, min_size=1)
    with pytest.warns(UserWarning, match="one community is left|blurring") as said:
        fit(callback, detector(sharpness=1e-6, modularity_weight=0.0), epochs=4)
    assert [w for w in said if "assignments are blurring, lower `sparsity_weight`" in str(w.message)]


def test_one_community_is_warned_of_with_the_history():
    callback = CommunityPruning(warmup=0, every=1, min_size=1)
    model = detector(modularity_weight=0.0, sparsity_weight=1.0, balance_weight=0.0, max_communities=3)
    with pytest.warns(UserWarning, match=r"their number went \[.*1\]. Raise `balance_weight`, or lower"):
        fit(callback, model, epochs=8)


def test_a_number_that_is_not_final_is_warned_of():
    callback, graph = CommunityPruning(warmup=0, every=1, min_size=1), planted_partition(3, 20)
    model, loader = detector(modularity_weight=0.0, sparsity_weight=0.3, balance_weight=0.0), DataLoader([graph])
    with pytest.warns(UserWarning, match=r"still dying when training ended; their number went \[7, 6\]. Train longer"):
        fit(callback, model, loader, epochs=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*still dying")
        fit(callback, epochs=20)
    assert callback.history[-1] == callback.history[-2]


def test_another_fit_begins_anew_and_a_test_does_not():
    callback = CommunityPruning(warmup=0, every=1)
    first = fit(callback, epochs=6)
    history = callback.history
    assert len(history) == 4
    tiny_trainer(callback).test(first, DataLoader([planted_partition(3, 20)]), verbose=False)
    assert callback.history == history
    fit(callback, epochs=4)
    assert len(callback.history) == 2


def test_it_is_for_detectors():
    with pytest.raises(MisconfigurationException, match="it prunes a `DAGCommunityDetector`, not a `TinyClassifier`"):
        tiny_trainer(CommunityPruning(), max_steps=1).fit(TinyClassifier(), TinyImages())


def test_all_wrong_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"warmup must be .* got -1; every must be .* got 0; min_size must be positive"
    ):
        CommunityPruning(-1, 0, 0.0)
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got 1.5"):
        CommunityPruning(every=1.5)
    for wrong in ("3", True, float("nan")):
        with pytest.raises(ValueError, match="min_size must be positive"):
            CommunityPruning(min_size=wrong)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_other_precisions(precision):
    callback = CommunityPruning(warmup=0, every=1)
    model = fit(callback, precision=precision)
    assert all(torch.tensor(value).isfinite() for value in callback.found.values())
    assert model.readout.live.any()
