"""Adjacency from kernels against loops over pairs, differences, and torch-geometric."""

import math
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hpo.hyper import HyperparameterSet, Positive
from lightning_hpo.nn.kernel_adjacency import KernelAdjacency, second_singular_value

N = 9
X = torch.rand(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SETTINGS: list[dict[str, Any]] = [
    {"kind": "polynomial", "param": 0.3, "degree": 3},
    {"kind": "threshold", "param": 0.7, "degree": 2},
    {"kind": "rbf", "param": 0.6},
    {"kind": "exponential", "param": 0.6},
]
kinds = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["kind"])
norms = pytest.mark.parametrize("normalize", ["row", "sym"])


def by_pairs(x: Tensor, settings: dict[str, Any], normalize: str, keep: Any = None) -> Tensor:
    a = torch.eye(len(x), dtype=x.dtype)
    for u, v in product(range(len(x)), repeat=2):
        if u == v or (keep is not None and (u, v) not in keep):
            continue
        s, d, p = torch.cosine_similarity(x[u], x[v], 0), (x[u] - x[v]).norm(), settings["param"]
        match settings["kind"]:
            case "polynomial":
                a[u, v] = (s + p) ** settings["degree"]
            case "threshold":
                a[u, v] = max(s - p, 0.0) ** settings["degree"]
            case "rbf":
                a[u, v] = math.exp(-(d**2) / p**2)
            case "exponential":
                a[u, v] = math.exp(-d / p)
    d = a.sum(1)
    return a / d[:, None] if normalize == "row" else a / (d[:, None] * d).sqrt()


def dense(edges: Any) -> Tensor:
    (source, target), weights = edges
    return torch.zeros(N, N, dtype=weights.dtype).index_put((target, source), weights)


@kinds
@norms
def test_the_matrix_is_the_formula(settings: dict[str, Any], normalize: Any) -> None:
    found = KernelAdjacency(**settings, normalize=normalize)(X)
    torch.testing.assert_close(found, by_pairs(X, settings, normalize))
    if normalize == "row":
        torch.testing.assert_close(found.sum(1), torch.ones(N).double())
    else:
        torch.testing.assert_close(found, found.T)


@kinds
@norms
def test_all_neighbours_are_the_matrix(settings: dict[str, Any], normalize: Any) -> None:
    module = KernelAdjacency(**settings, normalize=normalize, neighbors=N + 5)
    edge_index, weights = module(X)
    assert edge_index.shape == (2, N * N)
    torch.testing.assert_close(dense((edge_index, weights)), KernelAdjacency(**settings, normalize=normalize)(X))


@kinds
@norms
def test_some_neighbours_are_the_matrix_of_these(settings: dict[str, Any], normalize: Any) -> None:
    if settings["kind"] in ("rbf", "exponential"):
        close = -torch.cdist(X, X)
    else:
        close = torch.cosine_similarity(X[:, None], X, -1)
    chosen = close.fill_diagonal_(-math.inf).topk(2).indices
    keep = {(u, int(v)) for u in range(N) for v in chosen[u]}
    keep |= {(v, u) for u, v in keep}
    module = KernelAdjacency(**settings, normalize=normalize, neighbors=2)
    edges = module(X)
    assert {(int(v), int(u)) for u, v in edges[0].T} == keep | {(u, u) for u in range(N)}
    torch.testing.assert_close(dense(edges), by_pairs(X, settings, normalize, keep))
    torch.testing.assert_close(dense(module(X, module.edges(X))), dense(edges))


@kinds
@norms
@pytest.mark.parametrize("neighbors", [None, 3])
def test_gradients(settings: dict[str, Any], normalize: Any, neighbors: int | None) -> None:
    x, param = X.clone().requires_grad_(), torch.tensor(settings["param"], dtype=torch.float64, requires_grad=True)
    index = KernelAdjacency(**settings, neighbors=neighbors).edges(X) if neighbors else None

    def weights(param: Tensor, x: Tensor) -> Tensor:
        found = KernelAdjacency(**settings | {"param": lambda: param}, normalize=normalize, neighbors=neighbors)(
            x, index
        )
        return found if isinstance(found, Tensor) else found[1]

    assert torch.autograd.gradcheck(weights, (param, x))
    if settings["kind"] != "threshold":
        assert torch.autograd.gradgradcheck(weights, (param, x))


def test_given_and_shifted_similarities() -> None:
    cosine = torch.cosine_similarity(X[:, None], X, -1)
    for neighbors in (None, 2):
        settings: Any = {"kind": "polynomial", "param": 0.1, "degree": 8, "neighbors": neighbors}
        given, own = KernelAdjacency(**settings, similarity="given")(cosine), KernelAdjacency(**settings)(X)
        pairs = [(given, own)] if neighbors is None else list(zip(given, own, strict=True))
        assert all(torch.allclose(a, b) for a, b in pairs)
    signed = X - 0.5
    shifted = (1 + torch.cosine_similarity(signed[:, None], signed, -1)) / 2
    found = KernelAdjacency("polynomial", 0.1, degree=2, similarity="shifted_cosine")(signed)
    torch.testing.assert_close(found, KernelAdjacency("polynomial", 0.1, degree=2, similarity="given")(shifted))


def test_similarities_outside_the_range_are_refused_with_a_hint() -> None:
    for neighbors in (None, N):
        with pytest.raises(ValueError, match=r"between 0 and 1, got -.*shifted_cosine.*\(1 \+ cos\) / 2"):
            KernelAdjacency("polynomial", 0.1, neighbors=neighbors)(X - 0.5)
    KernelAdjacency("polynomial", 0.1, check=False)(X - 0.5)


def test_empty_rows_keep_their_loop() -> None:
    found = KernelAdjacency("threshold", 0.999, degree=2)(torch.eye(4))
    assert torch.equal(found, torch.eye(4))
    assert torch.equal(KernelAdjacency("polynomial", 0.0)(torch.zeros(3, 2)), torch.eye(3))


def test_equal_nodes_have_finite_gradients() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    for kind in ("rbf", "exponential"):
        for neighbors in (None, 1):
            found = KernelAdjacency(kind, 0.5, neighbors=neighbors)(x)
            weights = found if isinstance(found, Tensor) else found[1]
            (grad,) = torch.autograd.grad(weights.square().sum(), x)
            assert torch.equal(grad, torch.zeros(3, 2))


def test_wide_enough_under_autocast() -> None:
    expected = KernelAdjacency("rbf", 0.6)(X.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = KernelAdjacency("rbf", 0.6)(X.float())
    assert torch.equal(found, expected)
    assert KernelAdjacency("rbf", 0.6)(X.bfloat16()).dtype == torch.float32


def test_a_hyperparameter_set_is_followed() -> None:
    hypers = HyperparameterSet(sigma=Positive(0.6))
    module = KernelAdjacency("rbf", lambda: hypers["sigma"])
    module(X.float()).square().sum().backward()
    low, high = (KernelAdjacency("rbf", 0.6 + e)(X).square().sum() for e in (-1e-5, 1e-5))
    hypers.raw["sigma"].grad, found = None, hypers.raw["sigma"].grad
    slope = torch.sigmoid(hypers.raw["sigma"].detach())
    torch.testing.assert_close(found, ((high - low) / 2e-5).float() * slope, rtol=1e-3, atol=1e-5)
    assert list(module.state_dict()) == []
    parameter = nn.Parameter(torch.tensor(0.5))
    assert list(KernelAdjacency("rbf", parameter).parameters()) == [parameter]


def test_layers_of_torch_geometric_take_the_edges() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_geometric.nn import GCNConv
    layer = GCNConv(4, 3, normalize=False, bias=False).double()
    adjacency = KernelAdjacency("rbf", 0.6, neighbors=2)(X)
    torch.testing.assert_close(layer(X, *adjacency), dense(adjacency) @ X @ layer.lin.weight.T)


@pytest.mark.parametrize("neighbors", [None, N])
def test_graphs_that_make_nodes_alike_are_reported_in_evaluation(neighbors: int | None) -> None:
    alike = KernelAdjacency("rbf", 1e4, neighbors=neighbors)
    alike(X)
    with pytest.warns(UserWarning, match="makes all nodes alike"):
        alike.eval()(X)
    KernelAdjacency("rbf", 0.3, neighbors=neighbors).eval()(X)  # silent


def test_the_report_comes_at_a_tenth() -> None:
    sigmas = torch.linspace(0.3, 8, 40).tolist()
    for sigma in sigmas:
        module = KernelAdjacency("rbf", sigma)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.eval()(X)
        assert bool(caught) == bool(torch.linalg.svdvals(module.train()(X))[1] < 0.1)


def test_the_second_singular_value() -> None:
    for settings in SETTINGS:
        matrix = KernelAdjacency(**settings)(X)
        expected = torch.linalg.svdvals(matrix)[1]
        edges = KernelAdjacency(**settings, neighbors=N)(X)
        for form in (matrix, edges):
            torch.testing.assert_close(second_singular_value(form, N), expected, rtol=1e-3, atol=0)
    assert second_singular_value(torch.ones(1, 1), 1) == 0


def test_extra_edges_join_the_neighbours() -> None:
    given = torch.tensor([[0, 3], [5, 3]])
    index = KernelAdjacency("rbf", 0.6).edges(X, extra=given)
    assert {tuple(pair) for pair in index.T.tolist()} == {(0, 5)} | {(u, u) for u in range(N)}
    edge_index, weights = KernelAdjacency("rbf", 0.6)(X, index)
    assert torch.equal(edge_index, index)
    assert weights.shape == (N + 1,)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kind": "cubic", "param": 1.0, "degree": 0, "normalize": "col"}, ["kind", "degree", "normalize"]),
        ({"kind": "polynomial", "param": -0.1, "degree": 1.5, "neighbors": 0}, ["param", "degree", "neighbors"]),
        ({"kind": "rbf", "param": 0.0, "similarity": "given"}, ["be positive", "cannot be 'given'"]),
        ({"kind": "exponential", "param": math.inf, "degree": 2}, ["be positive", "has no degree"]),
        ({"kind": "threshold", "param": 1.0, "similarity": "dot"}, ["below 1", "similarity"]),
        ({"kind": "rbf", "param": torch.ones(1, requires_grad=True) * 2}, ["give a function"]),
    ],
)
def test_wrong_arguments_are_all_named(arguments: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        KernelAdjacency(**arguments)
    assert all(word in str(caught.value) for word in said)


def test_wrong_shapes_are_refused() -> None:
    for nodes in (torch.ones(3), torch.ones(3, 2)):
        with pytest.raises(ValueError, match="must be"):
            KernelAdjacency("polynomial", 0.1, similarity="given")(nodes)


def test_what_is_printed() -> None:
    assert repr(KernelAdjacency("rbf", 0.5)) == "KernelAdjacency(rbf, param=0.5, degree=1, row, neighbors=None)"
