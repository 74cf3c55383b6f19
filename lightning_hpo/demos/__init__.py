"""Small LightningModules and data modules on real data, for examples, docs and tests."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_hpo.demos.denoising_data import DenoisingDataModule, PhotoDenoisingDataModule
    from lightning_hpo.demos.graph_data import CitationDataModule, PlantedPartitionDataModule
    from lightning_hpo.demos.image_classifier import ImageClassifier
    from lightning_hpo.demos.image_data import DigitsDataModule, ImageDataModule
    from lightning_hpo.demos.image_files import (
        CIFAR10DataModule,
        FashionMNISTDataModule,
        ImageFolderDataModule,
        MNISTDataModule,
    )
    from lightning_hpo.demos.imbalanced_data import ImbalancedDataModule
    from lightning_hpo.demos.tabular_classifier import TabularClassifier
    from lightning_hpo.demos.text_data import SST2DataModule

_HOME = {
    "CIFAR10DataModule": "image_files",
    "CitationDataModule": "graph_data",
    "DenoisingDataModule": "denoising_data",
    "DigitsDataModule": "image_data",
    "FashionMNISTDataModule": "image_files",
    "ImageClassifier": "image_classifier",
    "ImageDataModule": "image_data",
    "ImageFolderDataModule": "image_files",
    "MNISTDataModule": "image_files",
    "ImbalancedDataModule": "imbalanced_data",
    "PhotoDenoisingDataModule": "denoising_data",
    "PlantedPartitionDataModule": "graph_data",
    "SST2DataModule": "text_data",
    "TabularClassifier": "tabular_classifier",
}

__all__ = [
    "CIFAR10DataModule",
    "CitationDataModule",
    "DenoisingDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageClassifier",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImbalancedDataModule",
    "MNISTDataModule",
    "PhotoDenoisingDataModule",
    "PlantedPartitionDataModule",
    "SST2DataModule",
    "TabularClassifier",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)  # timm and torchvision load on first use
