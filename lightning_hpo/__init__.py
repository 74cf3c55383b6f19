"""Hyperparameters that learn themselves inside an ordinary Lightning Trainer.

The public names below are imported on first use, so that ``import lightning_hpo`` costs nothing: neither torch nor
Lightning is loaded by it.

Example:
    >>> import lightning_hpo
    >>> "TokenCompression" in dir(lightning_hpo)
    True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors read; `_HOME` below is what Python reads
    from lightning_hpo.callbacks.adadagrad import AdaptiveBatchSize
    from lightning_hpo.callbacks.anyloss import MetricObjective
    from lightning_hpo.callbacks.base import MethodCallback
    from lightning_hpo.callbacks.bo_rep import SingleLoopHypergradient
    from lightning_hpo.callbacks.dag import CommunityPruning
    from lightning_hpo.callbacks.diffrate import TokenCompression
    from lightning_hpo.callbacks.implicit_differentiation import Hypergradient
    from lightning_hpo.callbacks.maid import ConvexHeadTuning
    from lightning_hpo.callbacks.micro_batch import MicroBatchFinder
    from lightning_hpo.callbacks.mip_hypernetworks import ConditionedTraining
    from lightning_hpo.callbacks.report import HyperparameterReport
    from lightning_hpo.callbacks.self_tuning_networks import SelfTuning
    from lightning_hpo.data import AdaptiveBatchSampler
    from lightning_hpo.functional.batching.learning_rate import (
        AdamSDE,
        AdaScale,
        LinearScaling,
        NoiseScaleLR,
        NoScaling,
        SqrtScaling,
    )
    from lightning_hpo.functional.batching.policies import (
        CABS,
        AugmentedTest,
        CoordinateTest,
        DiveBatch,
        InnerProductTest,
        NoiseScale,
        NormTest,
        SimiGrad,
    )
    from lightning_hpo.functional.batching.ramps import LinearRamp, StageWise
    from lightning_hpo.functional.bilevel.condition_spec import ConditionSpec
    from lightning_hpo.functional.compression.schedule import PUBLISHED_SCHEDULES, TokenCompressionSchedule
    from lightning_hpo.functional.optim.adagrad_norm import AdaGradNorm
    from lightning_hpo.functional.optim.normalized_momentum import NormalizedMomentum
    from lightning_hpo.functional.optim.sample_lr import SampleCosine, SampleLinear, SampleLR
    from lightning_hpo.graph_data import GraphDegree
    from lightning_hpo.hyper import Choice, HyperparameterSet, Integer, Interval, Positive, Simplex, UnitInterval
    from lightning_hpo.indexed_data import IndexedDataset
    from lightning_hpo.losses.anyloss import AnyLoss
    from lightning_hpo.losses.soft_confusion_matrix import SoftConfusionMatrix
    from lightning_hpo.metrics.dag import ClusteringAccuracy, SoftModularity
    from lightning_hpo.models.adadagrad import AdaptiveBatchSizeMixin
    from lightning_hpo.models.anyloss import MetricObjectiveMixin
    from lightning_hpo.models.bo_rep import DataHyperCleaning, SingleLoopMixin
    from lightning_hpo.models.dag import DAGCommunityDetector
    from lightning_hpo.models.diffrate import TokenCompressionMixin
    from lightning_hpo.models.implicit_differentiation import BilevelMixin
    from lightning_hpo.models.maid import MAIDModule
    from lightning_hpo.models.maid_per_sample import PerSampleMAIDModule
    from lightning_hpo.models.self_tuning_networks import SelfTuningMixin
    from lightning_hpo.nn.diffrate import apply_token_compression, remove_token_compression, vit_macs
    from lightning_hpo.nn.mip_hypernetworks import hypernetize
    from lightning_hpo.stratified_sampler import StratifiedSampler
    from lightning_hpo.tuners.data_driven_tuning import TaskDistributionTuner

__all__ = [
    "CABS",
    "PUBLISHED_SCHEDULES",
    "AdaGradNorm",
    "AdaScale",
    "AdamSDE",
    "AdaptiveBatchSampler",
    "AdaptiveBatchSize",
    "AdaptiveBatchSizeMixin",
    "AnyLoss",
    "AugmentedTest",
    "BilevelMixin",
    "Choice",
    "ClusteringAccuracy",
    "CommunityPruning",
    "ConditionSpec",
    "ConditionedTraining",
    "ConvexHeadTuning",
    "CoordinateTest",
    "DAGCommunityDetector",
    "DataHyperCleaning",
    "DiveBatch",
    "GraphDegree",
    "Hypergradient",
    "HyperparameterReport",
    "HyperparameterSet",
    "IndexedDataset",
    "InnerProductTest",
    "Integer",
    "Interval",
    "LinearRamp",
    "LinearScaling",
    "MAIDModule",
    "MethodCallback",
    "MetricObjective",
    "MetricObjectiveMixin",
    "MicroBatchFinder",
    "NoScaling",
    "NoiseScale",
    "NoiseScaleLR",
    "NormTest",
    "NormalizedMomentum",
    "PerSampleMAIDModule",
    "Positive",
    "SampleCosine",
    "SampleLR",
    "SampleLinear",
    "SelfTuning",
    "SelfTuningMixin",
    "SimiGrad",
    "Simplex",
    "SingleLoopHypergradient",
    "SingleLoopMixin",
    "SoftConfusionMatrix",
    "SoftModularity",
    "SqrtScaling",
    "StageWise",
    "StratifiedSampler",
    "TaskDistributionTuner",
    "TokenCompression",
    "TokenCompressionMixin",
    "TokenCompressionSchedule",
    "UnitInterval",
    "apply_token_compression",
    "hypernetize",
    "remove_token_compression",
    "vit_macs",
]

_HOME = {
    "AdaGradNorm": "functional.optim.adagrad_norm",
    "AdaScale": "functional.batching.learning_rate",
    "AdamSDE": "functional.batching.learning_rate",
    "AdaptiveBatchSampler": "data",
    "AdaptiveBatchSize": "callbacks.adadagrad",
    "AdaptiveBatchSizeMixin": "models.adadagrad",
    "AnyLoss": "losses.anyloss",
    "AugmentedTest": "functional.batching.policies",
    "BilevelMixin": "models.implicit_differentiation",
    "CABS": "functional.batching.policies",
    "Choice": "hyper",
    "ClusteringAccuracy": "metrics.dag",
    "CommunityPruning": "callbacks.dag",
    "ConditionSpec": "functional.bilevel.condition_spec",
    "ConditionedTraining": "callbacks.mip_hypernetworks",
    "ConvexHeadTuning": "callbacks.maid",
    "CoordinateTest": "functional.batching.policies",
    "DAGCommunityDetector": "models.dag",
    "DataHyperCleaning": "models.bo_rep",
    "DiveBatch": "functional.batching.policies",
    "GraphDegree": "graph_data",
    "Hypergradient": "callbacks.implicit_differentiation",
    "HyperparameterReport": "callbacks.report",
    "HyperparameterSet": "hyper",
    "IndexedDataset": "indexed_data",
    "InnerProductTest": "functional.batching.policies",
    "Integer": "hyper",
    "Interval": "hyper",
    "LinearRamp": "functional.batching.ramps",
    "LinearScaling": "functional.batching.learning_rate",
    "MAIDModule": "models.maid",
    "MethodCallback": "callbacks.base",
    "MetricObjective": "callbacks.anyloss",
    "MetricObjectiveMixin": "models.anyloss",
    "MicroBatchFinder": "callbacks.micro_batch",
    "NoScaling": "functional.batching.learning_rate",
    "NoiseScale": "functional.batching.policies",
    "NoiseScaleLR": "functional.batching.learning_rate",
    "NormTest": "functional.batching.policies",
    "NormalizedMomentum": "functional.optim.normalized_momentum",
    "PerSampleMAIDModule": "models.maid_per_sample",
    "PUBLISHED_SCHEDULES": "functional.compression.schedule",
    "Positive": "hyper",
    "SampleCosine": "functional.optim.sample_lr",
    "SampleLR": "functional.optim.sample_lr",
    "SampleLinear": "functional.optim.sample_lr",
    "SelfTuning": "callbacks.self_tuning_networks",
    "SelfTuningMixin": "models.self_tuning_networks",
    "SimiGrad": "functional.batching.policies",
    "Simplex": "hyper",
    "SingleLoopHypergradient": "callbacks.bo_rep",
    "SingleLoopMixin": "models.bo_rep",
    "SoftConfusionMatrix": "losses.soft_confusion_matrix",
    "SoftModularity": "metrics.dag",
    "SqrtScaling": "functional.batching.learning_rate",
    "StageWise": "functional.batching.ramps",
    "StratifiedSampler": "stratified_sampler",
    "TaskDistributionTuner": "tuners.data_driven_tuning",
    "TokenCompression": "callbacks.diffrate",
    "TokenCompressionMixin": "models.diffrate",
    "TokenCompressionSchedule": "functional.compression.schedule",
    "UnitInterval": "hyper",
    "apply_token_compression": "nn.diffrate",
    "hypernetize": "nn.mip_hypernetworks",
    "remove_token_compression": "nn.diffrate",
    "vit_macs": "nn.diffrate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
