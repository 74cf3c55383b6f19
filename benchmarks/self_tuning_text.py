"""Seven hyperparameters of an LSTM that predicts the next word of film reviews, for `self_tuning_search.py`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from self_tuning_tasks import Range, SearchTask, TunedModule, settings_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_hpo.demos.image_tensors import data_root
from lightning_hpo.demos.text_data import vocabulary_of
from lightning_hpo.nn.self_tuning_lstm import WeightDropLSTM
from lightning_hpo.nn.self_tuning_regularisers import TunedDropout, activation_penalty, temporal_penalty
from lightning_hpo.nn.setting import Setting

__all__ = ["text_task"]

END, UNKNOWN = 0, 1
LENGTH = 16  # words that an example predicts
TRAIN, TEST, SIZE = 1500, 1000, 64  # sentences, units of a layer
EPOCHS, TRIALS, RANDOM = 28, 4, 2
RANGES = {
    **{name: Range(0.0, 0.9) for name in ("embedding", "input", "hidden", "output", "weight_drop")},
    **{name: Range(0.01, 10.0, kind="log") for name in ("alpha", "beta")},
}


class Recurrent(nn.Module):
    """Two layers of an LSTM with dropout around and between, and dropped weights."""

    def __init__(self, words: int, size: int, at: Mapping[str, Setting]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.lstms = nn.ModuleList(
            WeightDropLSTM(size, size, batch_first=True, weight_drop=at["weight_drop"]) for _ in range(2)
        )
        self.whole_words = TunedDropout(at["embedding"], "channel")
        self.drops = nn.ModuleList(TunedDropout(at[name]) for name in ("input", "hidden", "output"))
        self.head = nn.Linear(size, words)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, and what the last layer puts out, after its dropout and before."""
        x = self.drops[0](self.whole_words(self.embedding(words)))
        out = self.lstms[0](x)[0]
        out = self.lstms[1](self.drops[1](out))[0]
        dropped = self.drops[2](out)
        return self.head(dropped), dropped, out


class LanguageModel(TunedModule):
    """Predicts every next word of a window."""

    def __init__(self, words: int, size: int, fixed: Mapping[str, float] | None) -> None:
        super().__init__()
        self.lr = 5.0
        hypers, self.at = settings_of(RANGES, fixed)
        if hypers is not None:
            self.hypers = hypers
        self.net = Recurrent(words, size, self.at)

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits of all words, and the words."""
        (words,) = batch
        return self.net(words[:, :-1])[0].flatten(0, 1), words[:, 1:].flatten()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy, and penalties on the size and the changes of the last layer's outputs."""
        (words,) = batch
        logits, dropped, out = self.net(words[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())
        return loss + activation_penalty(dropped, self.at["alpha"]) + temporal_penalty(out, self.at["beta"])

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


def windows(sentences: Sequence[str], vocabulary: Mapping[str, int]) -> TensorDataset:
    """The sentences one after another, cut into windows; each begins with the last word of the one before."""
    stream = [END]
    for sentence in sentences:
        stream += [vocabulary.get(word, UNKNOWN) for word in sentence.split()] + [END]
    whole = (len(stream) - 1) // LENGTH
    return TensorDataset(torch.tensor(stream[: whole * LENGTH + 1]).unfold(0, LENGTH + 1, LENGTH).contiguous())


def text_task(quick: bool) -> SearchTask:
    """The task; words at random in the place of sentences where it is to be quick."""
    if quick:
        drawn = torch.randint(2, 30, (3, 40, LENGTH + 1))
        parts, words = [TensorDataset(part) for part in drawn], 30
    else:
        folder = data_root(None) / "sst2"
        read = [_sentences((folder / f"{part}.tsv").read_text(encoding="utf-8")) for part in ("train", "dev", "test")]
        read = [read[0][:TRAIN], read[1], read[2][:TEST]]
        vocabulary = vocabulary_of(read[0], min_count=3)
        parts, words = [windows(part, vocabulary) for part in read], len(vocabulary) + 2
    build = partial(LanguageModel, words, 16 if quick else SIZE)
    common: dict[str, Any] = {
        "warmup_steps": 2 if quick else 120,
        "train_steps": 2,
        "tune_scales": False,
        "per_batch": ["weight_drop"],
    }
    tuning: dict[str, dict[str, Any]] = {"STN": common, "Δ-STN": common | {"lr": 0.02}}
    sizes = EPOCHS, TRIALS, RANDOM, 32
    return SearchTask("SST-2, next word", "text", RANGES, parts, build, *sizes, tuning, clip=0.25)


def _sentences(lines: str) -> list[str]:
    """Without their labels."""
    return [line.rsplit("\t", 1)[0] for line in lines.splitlines() if line.strip()]
