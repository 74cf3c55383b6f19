"""What TokenCompression refuses, when, and what it says."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import nn

from lightning_hpo import TokenCompression
from lightning_hpo.testing import TinyClassifier, TinyImages, tiny_trainer


class Holder(LightningModule):
    """A user's module around any network."""

    def __init__(self, network=None, **arguments):
        super().__init__()
        sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 4, "embed_dim": 16, "num_heads": 2}
        self.network = VisionTransformer(**{**sizes, "depth": 4, **arguments}) if network is None else network

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(module, compression=None, *extra, **arguments):
    compression = TokenCompression(0.6) if compression is None else compression
    trainer = tiny_trainer(compression, *extra, **{"max_steps": 2, **arguments})
    trainer.fit(module, TinyImages(8).train_dataloader())
    return compression


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 2.9}, "fraction of the dense cost"),
        ({"target": 1.0}, "is no budget"),
        ({"target": 0}, "is no budget"),
        ({"target": "2.9"}, "is no budget"),
        ({"granularity": 0}, "granularity must be a positive integer, got 0"),
        ({"granularity": 1.5}, "granularity must be a positive integer"),
        ({"granularity": True}, "granularity must be a positive integer"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"min_lr": 0.1}, "min_lr must lie between 0 and lr"),
        ({"min_lr": -0.1}, "min_lr must lie between 0 and lr"),
        ({"macs_weight": 0.0}, "macs_weight must be positive"),
        ({"macs_loss": "squared"}, "macs_loss must be 'relative' or 'absolute'"),
        ({"importance": "cls"}, "importance must be 'class' or 'mean'"),
        ({"matching": "values"}, "matching must be 'features', 'keys' or 'bipartite'"),
        ({"size_rule": "none"}, "size_rule must be 'clamped' or 'unclamped'"),
        ({"total_steps": 0}, "total_steps must be a positive integer"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenCompression(**{"target": 0.6, **arguments})


def test_wrong_arguments_are_listed_together():
    with pytest.raises(ValueError, match=r"granularity.*lr must.*matching"):
        TokenCompression(0.6, granularity=-1, lr=-1.0, matching="values")


# Networks


def test_a_network_without_attention():
    with pytest.raises(TypeError, match="holds no supported transformer block. Supported: vision_transformer.Block"):
        train(Holder(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))))


@pytest.mark.parametrize(
    ("make", "block"),
    [
        (lambda: Holder(timm.create_model("swin_tiny_patch4_window7_224")), "SwinTransformerBlock"),
        (lambda: Holder(timm.create_model("beit_base_patch16_224", depth=2)), "beit.Block"),
        (lambda: Holder(block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
        (lambda: Holder(attn_layer="diff"), "DiffAttention"),
    ],
)
def test_a_refused_block_is_named(make, block):
    with pytest.raises(NotImplementedError, match=f"does not support `.*{block}`"):
        train(make())


def test_a_block_of_the_users_own():
    class MyBlock(Block):
        pass

    with pytest.raises(TypeError, match="Blocks found: MyBlock"):
        train(Holder(block_fn=MyBlock))


@pytest.mark.parametrize("name", ["net", "network.bloks", "network.head", "network.blocks"])
def test_a_wrong_name(name):
    known = name in ("network.head", "network.blocks")
    error, message = (TypeError, "holds no supported") if known else (ValueError, r"networks found: \['network'\]")
    with pytest.raises(error, match=message):
        train(Holder(), TokenCompression(0.6, name))


def test_several_networks():
    module = Holder()
    module.teacher = Holder().network
    with pytest.raises(MisconfigurationException, match=r"several networks, \['network', 'teacher'\]; name one"):
        train(module)


def test_a_network_that_is_built_later():
    class Late(Holder):
        def __init__(self):
            super().__init__(nn.Identity())

        def configure_model(self):
            self.network = Holder().network

    with pytest.raises(MisconfigurationException, match="build it in `__init__` instead of `configure_model`"):
        train(Late())


@pytest.mark.parametrize("target", [0.1, 1e3, 1e12, "2.9G"])
def test_target_out_of_reach(target):
    """Below the floor or above the full cost: both bounds are said."""
    with pytest.raises(ValueError, match=r"brought from 0\.000\d+ G down to 0\.000\d+ G"):
        train(Holder(), TokenCompression(target))


def test_granularity_above_the_patches():
    with pytest.raises(ValueError, match=r"between 1 and the number of patches \(16\), got 17"):
        train(Holder(), TokenCompression(0.9, granularity=17))


@pytest.mark.parametrize("arguments", [{"depth": 1}, {"depth": 2, "global_pool": "avg"}])
def test_every_block_is_exempt(arguments):
    with pytest.raises(ValueError, match="Every block is exempt"):
        train(Holder(**arguments))


def test_a_single_compressible_block_learns():
    compression = train(Holder(depth=2), TokenCompression(0.85, lr=0.3), max_steps=4)
    assert compression.schedule.merge[1] < 10


def test_class_importance_without_a_class_token():
    with pytest.raises(ValueError, match="use `importance='mean'`"):
        train(Holder(class_token=False, global_pool="avg"), TokenCompression(0.8, importance="class"))


def test_patch_dropout_while_learning():
    with pytest.raises(ValueError, match="Patch dropout changes the number of tokens"):
        train(Holder(patch_drop_rate=0.5))


def test_gradient_checkpointing():
    module = Holder()
    module.network.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="Gradient checkpointing"):
        train(module)

    class Later(Holder):
        def on_fit_start(self):
            self.network.set_grad_checkpointing(True)

    with pytest.raises(ValueError, match="Gradient checkpointing"):
        train(Later())


def test_another_image_size_at_the_first_batch():
    class Larger(Holder):
        def forward(self, images):
            return self.network(F.interpolate(images, size=12))

    with pytest.raises(ValueError, match="set up for 16 patches, 36 arrived"):
        train(Larger(dynamic_img_size=True))


# The set-up


def test_the_callback_twice_on_one_network():
    with pytest.raises(RuntimeError, match="applied already"):
        train(Holder(), TokenCompression(0.6), TokenCompression(0.7, "network"))


def test_optimization_by_hand():
    module = Holder()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="set `automatic_optimization = True`"):
        train(module)


def test_a_network_under_no_grad():
    class Features(Holder):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, images):
            with torch.no_grad():
                features = self.network(images)
            return self.head(features)

    with pytest.raises(MisconfigurationException, match=r"under `torch.no_grad\(\)`"):
        train(Features())
    with pytest.warns(UserWarning, match="the budget alone moves them"):
        train(Features(), TokenCompression(0.6, freeze=False))


@pytest.mark.parametrize("wrong", ["argument", "network", "twice"])
def test_a_failed_start_leaves_the_module_alone(wrong):
    module = Holder()
    module.network.cls_token.requires_grad_(False)
    before = [(name, p.requires_grad) for name, p in module.named_parameters()]
    compression = TokenCompression(0.1 if wrong == "argument" else 0.6, "nothing" if wrong == "network" else None)
    extra = (TokenCompression(0.7, "network"),) if wrong == "twice" else ()
    with pytest.raises((ValueError, RuntimeError)):
        train(module, compression, *extra)
    assert type(module.network) is VisionTransformer
    assert [(name, p.requires_grad) for name, p in module.named_parameters()] == before


def test_a_loss_that_is_not_finite():
    class Broken(TinyClassifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.nan

    compression = TokenCompression(0.6)
    tiny_trainer(compression, max_steps=2, limit_val_batches=0).fit(Broken(), TinyImages(8))
    with pytest.raises(ValueError, match="rates are not finite because the training loss was not"):
        _ = compression.schedule


def test_no_schedule_before_training():
    with pytest.raises(RuntimeError, match="no schedule yet"):
        _ = TokenCompression(0.6).schedule
    assert TokenCompression(0.6).hyperparameters() == {}


def test_nothing_learned_or_loaded():
    module = TinyClassifier()
    with pytest.warns(UserWarning, match="leaves the network dense"):
        tiny_trainer(TokenCompression(0.6)).validate(module, TinyImages(8), verbose=False)


def test_length_of_training_unknown():
    with pytest.warns(UserWarning, match="set `total_steps`"):
        train(Holder(), max_steps=-1, max_epochs=-1, max_time={"seconds": 1})


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_rates_of_another_network(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, filename="end", every_n_train_steps=2)
    compression = train(Holder(), None, saver)
    with pytest.raises(MisconfigurationException, match="another depth, image size or matching"):
        train(Holder(depth=5), compression)
    with pytest.raises(MisconfigurationException, match="another granularity, matching, depth or image size"):
        tiny_trainer(TokenCompression(0.6, granularity=2), max_steps=3).fit(
            Holder(), TinyImages(8).train_dataloader(), ckpt_path=tmp_path / "end.ckpt"
        )
    with pytest.raises(MisconfigurationException, match="written with `module=None` \\(here 'network'\\)"):
        tiny_trainer(TokenCompression(0.6, "network"), max_steps=3).fit(
            Holder(), TinyImages(8).train_dataloader(), ckpt_path=tmp_path / "end.ckpt"
        )


@pytest.mark.parametrize("every", [0, 1, 3])
def test_any_logging_interval(every):
    train(Holder(), log_every_n_steps=every)
