"""Real tables of which some classes are rare, from what comes with scikit-learn."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_hpo.stratified_sampler import StratifiedSampler

__all__ = ["ImbalancedDataModule", "rare"]

_NAMES = ("breast_cancer", "diabetes", "digits", "iris", "wine")


def rare(labels: Tensor, classes: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """Indices of samples such that some classes are a given share of what is left.

    Members of those classes are left out at random; if even all of them are too few, others are.

    Args:
        labels: The class of each sample.
        classes: Those that become rare.
        share: Their share.
        generator: Decides who stays.

    Returns:
        Sorted indices.

    Example:
        >>> labels = torch.tensor([1] * 50 + [0] * 50)
        >>> kept = rare(labels, [1], 0.1, torch.Generator())
        >>> labels[kept].bincount()
        tensor([50,  6])
    """
    chosen = torch.isin(labels, torch.tensor(list(classes)))
    few, many = (part.nonzero().flatten() for part in (chosen, ~chosen))
    wanted = round(share / (1 - share) * len(many))
    if wanted <= len(few):
        few = few[torch.randperm(len(few), generator=generator)[:wanted]]
    else:
        many = many[torch.randperm(len(many), generator=generator)[: round((1 - share) / share * len(few))]]
    return torch.cat([few, many]).sort().values


class ImbalancedDataModule(LightningDataModule):
    """A table as a problem with rare classes; half of it for training, a quarter each for validation and test.

    A batch is standardised features ``(batch, columns)`` and targets: zeros and ones (floating point) of one class
    against the rest, or class numbers.

    Args:
        name: ``"breast_cancer"``, ``"diabetes"`` (positive: a progression in the top quarter), ``"digits"``, ``"iris"``
            or ``"wine"``.
        positive: The class that is told from the rest; ``None`` for all classes.
        share: Share of positives after thinning, or of every second class; ``None`` for what is there.
        batch_size: Samples in a batch.
        seed: Decides what is thinned, the split and the order.
        coarse: Whether digits are seen at a quarter of their pixels, where classes overlap.
        stratified: Whether training batches hold every class.

    Raises:
        ValueError: If there is no such set, class or share.

    Example:
        >>> data = ImbalancedDataModule("digits", positive=8, batch_size=32)
        >>> features, targets = next(iter(data.train_dataloader()))
        >>> features.shape, targets.shape, round(data.train_set.tensors[1].mean().item(), 2)
        (torch.Size([32, 64]), torch.Size([32]), 0.1)
    """

    def __init__(
        self,
        name: str = "breast_cancer",
        positive: int | None = 1,
        share: float | None = None,
        batch_size: int = 64,
        seed: int = 0,
        coarse: bool = False,
        stratified: bool = False,
    ) -> None:
        super().__init__()
        problems = [] if name in _NAMES else [f"name must be one of {list(_NAMES)}, got {name!r}"]
        if share is not None and not 0 < share < 1:
            problems.append(f"share must be between 0 and 1, got {share!r}")
        if coarse and name != "digits":
            problems.append(f"coarse is for digits, got name={name!r}")
        if problems:
            raise ValueError(f"`ImbalancedDataModule`: {'; '.join(problems)}.")
        self.batch_size, self.seed, self.stratified = batch_size, seed, stratified
        features, labels = _table(name, coarse)
        if positive is not None and not bool((labels == positive).any()):
            raise ValueError(f"`ImbalancedDataModule`: there is no class {positive!r} in {name}.")
        generator = torch.Generator().manual_seed(seed)
        targets = labels if positive is None else (labels == positive).long()
        if share is not None:
            few = list(range(1, int(labels.max()) + 1, 2)) if positive is None else [1]
            kept = rare(targets, few, share, generator)
            features, targets = features[kept], targets[kept]
        parts = _split(targets, generator)
        mean, deviation = features[parts[0]].mean(0), features[parts[0]].std(0) + 1e-6
        features = (features - mean) / deviation
        typed = targets if positive is None else targets.float()
        self.train_set, self.val_set, self.test_set = (TensorDataset(features[part], typed[part]) for part in parts)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled, or every class in every batch."""
        if self.stratified:
            sampler = StratifiedSampler(self.train_set.tensors[1].long(), self.batch_size, seed=self.seed)
            return DataLoader(self.train_set, self.batch_size, sampler=sampler)
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """A quarter of the samples."""
        return DataLoader(self.val_set, self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Another quarter."""
        return DataLoader(self.test_set, self.batch_size)


def _table(name: str, coarse: bool) -> tuple[Tensor, Tensor]:
    from sklearn import datasets  # takes a second to import

    table = getattr(datasets, f"load_{name}")()
    features, labels = torch.tensor(table.data, dtype=torch.float32), torch.tensor(table.target)
    if coarse:
        features = features.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    if name == "diabetes":
        labels = (labels >= labels.quantile(0.75)).long()
    if name == "breast_cancer":
        labels = 1 - labels  # malignant is what one looks for
    return features, labels


def _split(targets: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Half, quarter and quarter of every class."""
    parts: list[list[Tensor]] = [[], [], []]
    for label in targets.unique():
        members = (targets == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        half, most = len(members) // 2, 3 * len(members) // 4
        for part, chosen in zip(parts, members.tensor_split([half, most]), strict=True):
            part.append(chosen)
    return [torch.cat(part) for part in parts]
