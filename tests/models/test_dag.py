"""The detector: loss, draws, resume, graphs that are of no use, results."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader, NeighborLoader, RandomNodeLoader
from torch_geometric.typing import WITH_PYG_LIB, WITH_TORCH_SPARSE

from lightning_hpo import CommunityPruning, DAGCommunityDetector, GraphDegree, checked_graphs
from lightning_hpo.demos.graph_data import planted_partition
from lightning_hpo.functional.graphs.dag import balance, community_sums, effective_communities, soft_modularity
from lightning_hpo.functional.graphs.masked_attributes import AttributeMask
from lightning_hpo.graph_data import graph_of
from lightning_hpo.testing import tiny_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*still dying when training ended")

WEIGHTS = {"reconstruction_weight": 0.7, "modularity_weight": 1.3, "sparsity_weight": 0.2, "balance_weight": 0.4}


def detector(**arguments):
    small = {"max_communities": 8, "hidden_channels": 16, "heads": 2, "warmup_epochs": 2, "ramp_epochs": 0, "lr": 0.01}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DAGCommunityDetector(16, **{**small, **arguments})


def graph(seed=0, **changes):
    data = planted_partition(3, 20, seed=seed)
    for name, value in changes.items():
        setattr(data, name, value)
    return data


def fit(model, data=None, epochs=6, callback=None, **arguments):
    trainer = tiny_trainer(callback or CommunityPruning(warmup=0, every=1), max_epochs=epochs)
    trainer.fit(model, DataLoader([graph() if data is None else data]), **arguments)
    return trainer


class Silent(DAGCommunityDetector):
    """Without a Trainer: nothing is logged, and the search has begun."""

    is_joint = True
    joint_epochs = 1.0

    def log(self, *args, **kwargs):
        pass

    def log_dict(self, *args, **kwargs):
        pass


def test_the_loss_is_the_sum_of_its_terms():
    model = Silent(16, 8, 16, 2, dropout=0, attention_dropout=0, ramp_epochs=0, gamma=2.0, **WEIGHTS)
    model.readout.prune(torch.arange(8) < 6)
    data = graph_of(graph())
    mask = AttributeMask(torch.arange(0, 60, 2), torch.tensor([0, 2]), torch.tensor([5, 7]))
    loss = model._loss(*model._terms(data, mask), is_part=False)
    codes = model.autoencoder(model.autoencoder.corrupt(data.x, mask), data.edge_index)
    P = model.readout(codes)
    found = model.autoencoder.decode(codes, data.edge_index, mask.masked)[mask.masked]
    expected = 0.7 * (1 - F.cosine_similarity(found, data.x[mask.masked])).square().mean()
    expected -= 1.3 * soft_modularity(P, data.edge_index)
    expected += 0.2 * (effective_communities(P).sqrt() - 1) + 0.4 * balance(P, 6)
    torch.testing.assert_close(loss, expected)


def test_nodes_may_be_renumbered():
    model = Silent(16, 8, 16, 2, dropout=0, attention_dropout=0, ramp_epochs=0)
    data, order = graph(), torch.randperm(60)
    other = Data(x=data.x[order], edge_index=order.argsort()[data.edge_index])
    none = torch.empty(0, dtype=torch.long)
    masks = [AttributeMask(nodes, none, none) for nodes in (torch.arange(30), order.argsort()[:30])]
    losses = [
        model._loss(*model._terms(graph_of(d), m), is_part=False) for d, m in zip((data, other), masks, strict=True)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.codes(graph_of(other)), model.codes(graph_of(data))[order], rtol=1e-4, atol=1e-5)


def test_reconstruction_comes_first_and_leaves_the_readout_without_gradient():
    model = detector(warmup_epochs=3, weight_decay=0.0)
    before = copy.deepcopy(model.readout.state_dict())
    with pytest.warns(UserWarning, match="nothing is pruned in 3 epochs"):
        trainer = fit(model, epochs=3)
    assert all(torch.equal(value, before[name]) for name, value in model.readout.state_dict().items())
    assert trainer.callback_metrics["dag/loss"] == trainer.callback_metrics["dag/reconstruction"]  # to be monitored
    assert "dag/soft_modularity" not in trainer.callback_metrics


def test_runs_of_one_seed_are_alike_whatever_else_is_drawn():
    losses = []
    for outside in (1, 2):
        torch.manual_seed(outside)
        model = detector(seed=5)
        losses.append(fit(model).callback_metrics["dag/loss"])
    assert torch.equal(*losses)
    assert not torch.equal(fit(detector(seed=6)).callback_metrics["dag/loss"], losses[0])


class LossCheckpoint(ModelCheckpoint):
    """Notes every loss, and saves every epoch."""

    def __init__(self, folder):
        super().__init__(dirpath=folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("epoch", [0, 1, 2, 5])  # in the warm-up, at its end, at the start of the search, later
def test_a_run_that_goes_on_has_the_same_losses(epoch, tmp_path):
    def run(seed, folder, ckpt_path=None):
        torch.manual_seed(seed)
        saver, pruning = LossCheckpoint(tmp_path / folder), CommunityPruning(warmup=1, every=2)
        model = detector(ramp_epochs=4)
        trainer = tiny_trainer(saver, pruning, max_epochs=9)
        trainer.fit(model, DataLoader([graph()]), ckpt_path=ckpt_path)
        return saver.losses, model.state_dict(), pruning.history

    whole = run(1, "first")
    rest = run(2, "second", str(tmp_path / "first" / f"epoch={epoch}.ckpt"))
    assert rest[0] == whole[0][epoch + 1 :]
    assert all(torch.equal(value, whole[1][name]) for name, value in rest[1].items())
    assert rest[2] == whole[2]


def test_a_second_fit_goes_on_with_the_search():
    model = detector()
    fit(model)
    left = int(model.readout.live.sum())
    trainer = fit(model, epochs=2)
    assert "dag/soft_modularity" in trainer.callback_metrics  # no second warm-up
    assert model.readout.live.sum() <= left


def test_a_module_can_be_copied_and_loaded_from_a_checkpoint(tmp_path):
    model = detector()
    trainer = fit(model)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = DAGCommunityDetector.load_from_checkpoint(tmp_path / "end.ckpt")
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other.predict_communities(graph()).labels, model.predict_communities(graph()).labels)


@pytest.mark.parametrize("seed", range(5))
def test_planted_communities_are_found_and_counted(seed):
    torch.manual_seed(seed)
    data = planted_partition(seed=seed)
    model = DAGCommunityDetector(
        16, max_communities=16, hidden_channels=32, warmup_epochs=30, ramp_epochs=10, lr=3e-3, seed=seed
    )
    trainer = fit(model, data, epochs=70, callback=CommunityPruning(warmup=10, every=2))
    (scores,) = trainer.test(model, DataLoader([data]), verbose=False)
    assert scores["test_communities"] == 4
    assert scores["test_ari"] >= 0.95
    assert scores["test_accuracy"] >= 0.98
    assert model.predict_communities(data).report().modularity > 0.5


def test_results_are_numbered_by_size_and_on_the_nodes():
    model = detector()
    fit(model)
    result = model.predict_communities(graph())
    sizes = result.labels.bincount()
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    assert len(sizes) == result.n_communities == result.membership.shape[1]
    assert torch.equal(result.membership.argmax(1), result.labels)
    assert result.report().sizes == tuple(sizes.tolist())
    (predicted,) = tiny_trainer().predict(model, DataLoader([graph()]))
    assert torch.equal(predicted.labels, result.labels)


def test_parts_of_a_graph_average_their_degree_share():
    model = Silent(16, 4, 16, 2, dropout=0, attention_dropout=0, ramp_epochs=0, average=0.5)
    data = GraphDegree()(graph())
    none = torch.empty(0, dtype=torch.long)
    shares = []
    for part in RandomNodeLoader(data, num_parts=3):
        piece = graph_of(part)
        sums, error, rows = model._terms(piece, AttributeMask(torch.arange(5), none, none))
        assert piece.nodes == 60
        shares.append((sums.degree_mass / piece.degree.sum()).detach())
        loss = model._loss(sums, error, rows, is_part=True)
        gradient = torch.autograd.grad(loss, model.readout.head.bias)[0]
    expected = shares[0] / 4 + shares[1] / 4 + shares[2] / 2
    torch.testing.assert_close(model.degree_share, expected)
    assert gradient.abs().max() > 0


def test_the_averaged_share_has_the_value_of_the_average_and_the_slope_of_the_batch():
    model = detector(average=0.5)
    model.degree_share.copy_(torch.arange(8) / 28)
    scores = torch.randn(6, 8, requires_grad=True)
    sums = community_sums(scores.softmax(1), torch.tensor([[0, 1, 2], [1, 0, 3]]), torch.tensor([1, 2, 3, 4, 5, 6]))
    own = sums.degree_mass / 21
    found = model._averaged_share(sums)
    torch.testing.assert_close(found, (0.5 * torch.arange(8) / 28 + 0.5 * own))
    (slope,) = torch.autograd.grad(found.square().sum(), scores, retain_graph=True)
    (expected,) = torch.autograd.grad((2 * found.detach() * own).sum(), scores)
    torch.testing.assert_close(slope, expected)


def test_a_graph_in_parts_is_learned():
    data = GraphDegree()(planted_partition(3, 60, p_out=0.01))
    torch.manual_seed(0)
    model = DAGCommunityDetector(16, 8, 32, warmup_epochs=10, ramp_epochs=5, lr=3e-3)
    trainer = tiny_trainer(CommunityPruning(warmup=5, every=1), max_epochs=30)
    trainer.fit(model, RandomNodeLoader(data, num_parts=3, shuffle=True))
    (scores,) = trainer.test(model, DataLoader([data]), verbose=False)
    assert scores["test_communities"] == 3
    assert scores["test_ari"] >= 0.9


@pytest.mark.skipif(not (WITH_PYG_LIB or WITH_TORCH_SPARSE), reason="NeighborLoader needs pyg-lib or torch-sparse")
@pytest.mark.filterwarnings("ignore:Using 'NeighborSampler' without a 'pyg-lib'")
@pytest.mark.parametrize("kind", ["directional", "bidirectional", "induced"])
def test_neighbourhoods_of_a_graph_are_learned(kind):
    data = GraphDegree()(planted_partition(4, 50))
    torch.manual_seed(0)
    model = DAGCommunityDetector(16, 16, 32, warmup_epochs=20, ramp_epochs=10, lr=3e-3)
    loader = NeighborLoader(data, num_neighbors=[5, 5], batch_size=40, shuffle=True, subgraph_type=kind)
    tiny_trainer(CommunityPruning(warmup=10, every=2), max_epochs=60).fit(model, loader)
    (scores,) = tiny_trainer().test(model, DataLoader([data]), verbose=False)
    assert scores["test_communities"] == 4
    assert scores["test_ari"] >= 0.9


# Graphs that are of no use, or need mending


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"edge_index": None}, "there is no `edge_index`"),
        ({"edge_index": torch.tensor([[0, 99], [99, 0]])}, "edge_index goes up to 99, but there are 60 nodes"),
        ({"edge_index": torch.tensor([[0, -1], [-1, 0]])}, "edge_index goes down to -1"),
        ({"edge_index": torch.zeros(2, 0, dtype=torch.long)}, r"no edges \(m = 0\): modularity is undefined"),
        ({"edge_index": torch.tensor([[1], [1]])}, r"no edges \(m = 0\)"),
        ({"edge_index": torch.zeros(3, 4)}, r"whole numbers of shape \(2, edges\), got \(3, 4\)"),
        (
            {"x": torch.zeros(60, 16)},
            r"all zero in all 60 nodes; take them from the structure with .*LocalDegreeProfile",
        ),
        ({"x": torch.full((60, 16), float("nan"))}, "not finite in 60 of 60 nodes"),
        ({"x": torch.ones(60, 5)}, "in_channels is 16, but nodes have 5 attributes"),
        ({"x": torch.ones(60, 16, dtype=torch.long)}, "dense floating-point matrix"),
        ({"x": torch.full((60, 16), 1e300, dtype=torch.float64)}, "not finite in 60 of 60 nodes"),  # in float32
        ({"edge_index": [[0], [1]]}, "whole numbers of shape .*, got list"),
    ],
)
def test_graphs_of_no_use(changes, problem):
    with pytest.raises(ValueError, match=problem):
        fit(detector(), graph(**changes), epochs=4)
    with pytest.raises(ValueError, match=problem):
        detector().predict_communities(graph(**changes))


def test_all_problems_of_a_graph_are_listed():
    data = graph(x=torch.ones(60, 5), edge_index=torch.tensor([[0], [60]]))
    with pytest.raises(ValueError, match="edge_index goes up to 60.*N = 60, got 61.*in_channels is 16"):
        fit(detector(max_communities=61), data, epochs=3)


@pytest.mark.filterwarnings("ignore:Unable to accurately infer 'num_nodes'")  # torch-geometric's own
def test_attributes_that_are_not_there():
    for use in (lambda data: fit(detector(), data), lambda data: detector().predict_communities(data)):
        with pytest.raises(
            ValueError, match="no attributes `x`; take them from the structure with .*LocalDegreeProfile"
        ):
            use(graph(x=None))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"x": torch.full((60, 16), float("nan"))}, "not finite in 60 of 60 nodes"),
        ({"edge_index": torch.zeros(2, 0, dtype=torch.long)}, r"no edges \(m = 0\)"),
        ({"x": torch.ones(60, 5)}, "in_channels is 16, but nodes have 5 attributes"),
    ],
)
def test_every_graph_of_a_loader_is_looked_at(changes, problem):
    with pytest.raises(ValueError, match=problem):
        tiny_trainer(CommunityPruning(0, 1), max_epochs=4).fit(detector(), DataLoader([graph(), graph(**changes)]))


@pytest.mark.filterwarnings("ignore:.*nothing is pruned in")
def test_graphs_are_looked_at_in_the_first_epoch_of_each_fit(monkeypatch):
    seen = []
    monkeypatch.setattr(checked_graphs, "graph_problems", lambda graph, *_: seen.append(graph) or [])
    model = detector()
    for fits in (1, 2):
        fit(model, epochs=4, callback=CommunityPruning())
        assert len(seen) == fits


def test_parts_may_have_no_edges():
    data = GraphDegree()(planted_partition(3, 40, p_in=0.02, p_out=0))
    parts = RandomNodeLoader(data, num_parts=12)
    assert min(part.num_edges for part in parts) == 0
    trainer = tiny_trainer(CommunityPruning(warmup=0, every=1), max_epochs=5)
    trainer.fit(detector(max_communities=4), parts)
    assert all(value.isfinite() for value in trainer.callback_metrics.values())


def test_a_batch_that_is_no_graph():
    with pytest.raises(TypeError, match=r"must be a `torch_geometric.data.Data`, got `list`"):
        tiny_trainer(CommunityPruning(), max_epochs=60).fit(detector(), torch.utils.data.DataLoader([[1]]))
    with pytest.raises(TypeError, match=r"must be a `torch_geometric.data.Data`, got `Tensor`"):
        tiny_trainer().test(detector(), torch.utils.data.DataLoader([torch.ones(3)]), verbose=False)


def test_directed_edges_are_mended_with_a_warning_or_refused():
    half = graph()
    half.edge_index = half.edge_index[:, half.edge_index[0] < half.edge_index[1]]
    mended = detector()
    with pytest.warns(UserWarning, match="edges are directed; missing directions are added") as said:
        fit(mended, half)
    assert sum("edges are directed" in str(warning.message) for warning in said) == 1
    both = detector()
    fit(both, graph())
    assert all(torch.equal(value, both.state_dict()[name]) for name, value in mended.state_dict().items())
    with pytest.raises(ValueError, match="edges are directed; give both directions, or `symmetrize=True`"):
        fit(detector(symmetrize=False), half)
    with pytest.raises(ValueError, match="edges are directed"):
        detector(symmetrize=False).predict_communities(half)


def test_a_graph_is_asked_about_whatever_was_trained_on():
    half = graph()
    half.edge_index = half.edge_index[:, half.edge_index[0] < half.edge_index[1]]
    model = detector()
    fit(model)
    with pytest.warns(UserWarning, match="edges are directed; missing directions are added"):
        found = model(half)
    torch.testing.assert_close(found, model(graph()))
    assert torch.equal(found.argmax(1), model(graph()).argmax(1))
    with pytest.raises(ValueError, match="not finite in 60 of 60 nodes"):
        model(graph(x=torch.full((60, 16), float("nan"))))


def test_loops_and_repeated_edges_are_left_out():
    untidy = graph()
    untidy.edge_index = torch.cat([untidy.edge_index, untidy.edge_index[:, :9], torch.tensor([[3], [3]])], dim=1)
    first, second = detector(), detector()
    fit(first, untidy)
    fit(second, graph())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"max_communities": 1}, "max_communities must be an integer of at least 2, got 1"),
        ({"mask_rate": 1.0}, "mask_rate must lie between 0 and 1, got 1.0"),
        ({"replace_rate": -0.1}, "replace_rate must lie between 0 and 1"),
        ({"gamma": 0.5}, "gamma must lie between 1 and inf, got 0.5"),
        ({"sparsity_weight": -1.0}, "sparsity_weight must lie between 0 and inf"),
        ({"seed": 2**32}, r"seed must be an integer from 0 to 2\*\*32 - 1, got 4294967296"),
        (
            {"lr": "0.1", "mask_rate": None, "dropout": "x", "symmetrize": "no", "seed": True},
            "dropout must be at least 0 and below 1, got 'x'; mask_rate must .* got None; lr must .* got '0.1'; "
            r"seed must be .* got True; symmetrize must be true or false, got 'no'",
        ),
        ({"warmup_epochs": 1.5, "lr": 0.0}, "warmup_epochs must be an integer .* got 1.5; lr must lie"),
        ({"heads": 3}, "hidden_channels must be a multiple of heads, got 16 and 3"),
        ({"heads": 3, "dropout": 1.0, "mask_rate": 1.0}, "multiple of heads, .*; dropout must be .*; mask_rate must"),
    ],
)
def test_wrong_arguments(wrong, problem):
    with pytest.raises(ValueError, match=problem):
        detector(**wrong)


def test_a_rate_that_masks_nothing():
    with pytest.raises(ValueError, match="mask_rate 0.01 masks 0 of 60 nodes"):
        fit(detector(mask_rate=0.01))


def test_parts_with_fewer_nodes_than_communities():
    loader = RandomNodeLoader(GraphDegree()(graph()), num_parts=12)
    with pytest.raises(ValueError, match="a batch of 5 nodes has not 8; take larger batches"):
        tiny_trainer(CommunityPruning(warmup=0, every=1), max_epochs=4).fit(detector(), loader)


def test_loaders_without_a_length():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield graph()

    trainer, model = tiny_trainer(CommunityPruning(), max_steps=3), detector()
    with pytest.raises(MisconfigurationException, match="has no length; give it one, or set"):
        trainer.fit(model, DataLoader(Endless()))


def test_labels_are_needed_for_the_test_alone():
    data = graph()
    del data.y
    model = detector()
    fit(model, data)
    with pytest.raises(ValueError, match="there are no labels `y` to test against"):
        tiny_trainer().test(model, DataLoader([data]), verbose=False)


def test_labels_do_not_change_what_is_learned():
    first, second = detector(), detector()
    fit(first, graph())
    fit(second, graph(y=torch.zeros(60, dtype=torch.long)))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
