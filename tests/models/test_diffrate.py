"""The mixin is a door to the callback and to nothing else."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from lightning_hpo import TokenCompression, TokenCompressionMixin
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer


class Compressed(TokenCompressionMixin, TinyClassifier):
    pass


def test_learns_what_the_callback_learns():
    module = Compressed(compression_target=0.6, compression_args={"lr": 0.3})
    trainer = tiny_trainer(max_steps=3)
    trainer.fit(module, TinyImages(8))
    (compression,) = (c for c in trainer.callbacks if isinstance(c, TokenCompression))
    direct = TokenCompression(0.6, lr=0.3)
    tiny_trainer(direct, max_steps=3).fit(TinyClassifier(), TinyImages(8))
    assert torch.equal(compression.hypers.raw["kept"], direct.hypers.raw["kept"])
    assert compression.schedule == direct.schedule
    assert set(module.state_dict()) == set(TinyClassifier().state_dict())


def test_arguments_of_the_module_pass_through():
    module = Compressed(6, lr=0.5, compression_target="90K")
    assert len(module.network.blocks) == 6
    assert module.lr == 0.5
    (callback,) = module.configure_callbacks()
    assert callback.target == "90K"


@pytest.mark.parametrize("as_list", [True, False])
def test_callbacks_of_the_module_stay(as_list):
    class Own(TinyClassifier):
        def configure_callbacks(self):
            stopping = EarlyStopping("val_loss")
            return [stopping] if as_list else stopping

    class Both(TokenCompressionMixin, Own):
        pass

    kinds = [type(callback) for callback in Both().configure_callbacks()]
    assert kinds == [EarlyStopping, TokenCompression]
    assert all(issubclass(kind, Callback) for kind in kinds)


def test_a_wrong_argument_is_the_callbacks_error():
    with pytest.raises(ValueError, match="is no budget"):
        Compressed(compression_target=2.9).configure_callbacks()
    with pytest.raises(TypeError, match="compress"):
        Compressed(compression_args={"compress": 1}).configure_callbacks()
