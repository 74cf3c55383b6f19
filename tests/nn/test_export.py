"""A compressed network through torch's compilers, and a training pass that reads nothing back to the host."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_hpo import TokenCompression
from lightning_hpo.nn.diffrate import apply_token_compression
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer

_spec = importlib.util.spec_from_file_location("networks", Path(__file__).with_name("networks.py"))
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

SOME = ["class token", "SigLIP", "DINOv3", "CAFormer"]
BATCH = ({0: torch.export.Dim("batch", min=2, max=64)},)


def compressed(name):
    model = networks.build(name)
    layout = networks.anatomy_of(model).layout
    return apply_token_compression(model, networks.schedule_of(layout, networks.falling_rates(layout)))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compilers warn of themselves
        yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", [*SOME, "distilled", "registers only", "EVA-02", "mixed RoPE", "post-norm EVA"])
def test_compile_as_one_graph(name):
    model = compressed(name)
    x = networks.images(model)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["class token"])
def test_compile_with_code_generation(name):
    model = compressed(name)
    x = networks.images(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_while_learning(backend):
    model = networks.build("class token")
    _, raw, _ = networks.learn(model)
    model.train()
    x = networks.images(model)
    logits = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(y.square().sum(), raw)[0] for y in (logits, model(x))]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "strict"), [("class token", True), ("MAE pool", False), ("mixed RoPE", False)])
def test_export_with_any_batch_size(name, strict):
    model = compressed(name)
    exported = torch.export.export(model, (networks.images(model, 3),), dynamic_shapes=BATCH, strict=strict).module()
    for batch in (2, 5):
        x = networks.images(model, batch)
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_export_of_the_rest(name, tmp_path):
    model = compressed(name)
    exported = torch.export.export(model, (networks.images(model, 3),), dynamic_shapes=BATCH)
    torch.export.save(exported, tmp_path / "short.pt2")
    x = networks.images(model, 5)
    torch.testing.assert_close(torch.export.load(tmp_path / "short.pt2").module()(x), model(x))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
def test_onnx(name):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model = compressed(name)
    x = networks.images(model)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    (logits,) = reference.ReferenceEvaluator(program.model_proto).run(
        None, {program.model_proto.graph.input[0].name: x.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_trace():
    model = compressed("class token")
    traced = torch.jit.trace(model, networks.images(model, 3), check_trace=False)
    x = networks.images(model, 5)
    torch.testing.assert_close(traced(x), model(x))


class Watch(TorchDispatchMode):
    """Notes operators that wait for the device: values read back, sizes that depend on values, copies from the host."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "lift_fresh", "equal", "_to_cpu")

    def __init__(self):
        super().__init__()
        self.found, self.operators = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        name = function.name().removeprefix("aten::").partition(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            getattr(i, "dtype", 0) == torch.bool for i in args[1]
        )
        if name in self.WAITING or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits():
    with Watch() as watch:
        x = torch.zeros(3)
        _ = x.sum().item(), x.new_tensor(0.0), x[x > 0], bool(x.any())
    assert set(watch.found) == {"_local_scalar_dense", "lift_fresh", "index"}


@pytest.mark.parametrize("importance", ["class", "mean"])
@pytest.mark.parametrize("name", SOME)
def test_no_host_synchronisation_in_training_step(name, importance):
    model = networks.build(name)
    if importance == "class" and not networks.anatomy_of(model).has_class_token:
        importance = None
    networks.learn(model, importance=importance)
    x = networks.images(model)
    model.train()
    with Watch() as watch:
        model(x).square().sum().backward()
    assert watch.operators > 200
    assert watch.found == []


def test_no_host_synchronisation_when_the_budget_is_added():
    watches = []

    class Watched(TokenCompression):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            with Watch() as watch:
                super().on_before_optimizer_step(trainer, pl_module, optimizer)
            watches.append(watch)

        @staticmethod
        def step_own(trainer, optimizer):
            """Torch's own optimizer keeps its count of steps on the host."""

    tiny_trainer(Watched(0.6), max_steps=3).fit(TinyClassifier(), TinyImages(8))
    assert all(watch.operators > 20 for watch in watches)
    assert [watch.found for watch in watches[1:]] == [[], []]  # in the first step Lightning prepares what is logged
