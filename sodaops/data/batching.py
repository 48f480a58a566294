"""A split as tokens and targets, and the loader that batches it for Lightning."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sodaops.data.tokens import pad, plan_batches


@dataclass(frozen=True)
class Tokenised:
    """A split as arrays: all tokens in a row, and where each text begins."""

    tokens: np.ndarray  # int32 [n_tokens]
    offsets: np.ndarray  # int64 [n_examples + 1]
    label_ids: np.ndarray  # int64 [n_examples]
    targets: np.ndarray  # float32 [n_examples, n_labels]
    pad_token_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [n_examples]."""
        return np.diff(self.offsets)

    def batch(self, places: np.ndarray) -> dict[str, torch.Tensor]:
        """The texts at ``places`` (int64 [n]), padded to the longest among them."""
        ids, mask = pad([self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in places], self.pad_token_id)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "label_ids": torch.from_numpy(self.label_ids[places]),
            "targets": torch.from_numpy(self.targets[places]),
        }


def soft_targets(label_ids: np.ndarray, votes: Sequence[Sequence[int] | None], n_labels: int, weight: float) -> np.ndarray:
    """Target distributions: a mix of the raters' vote shares and the label; rows without votes are their label.

    Args:
        label_ids: int64 [n_examples].
        votes: for each example the votes in label order, or None.
        n_labels: labels in all.
        weight: share of the votes in the mix, in [0, 1].

    Returns:
        float32 [n_examples, n_labels], rows sum to 1.

    >>> soft_targets(np.array([0, 1]), [[3, 1], None], 2, 0.5).tolist()
    [[0.875, 0.125], [0.0, 1.0]]
    """
    targets = np.eye(n_labels, dtype=np.float32)[label_ids]
    voted = np.array([i for i, vote in enumerate(votes) if vote is not None], dtype=np.int64)
    if weight and len(voted):
        shares = np.array([votes[i] for i in voted], dtype=np.float32)
        shares /= shares.sum(axis=1, keepdims=True)
        targets[voted] = weight * shares + (1 - weight) * targets[voted]
    return targets


class TokenLoader:
    """An iterable of padded batches that Lightning can stop and resume within an epoch.

    Several processes share each batch: it then holds up to ``n_ranks`` budgets, and each process takes every n_ranks-th of
    its texts, of which lengths are alike. All have the same number of batches, and together each text once. A batch says in
    ``share`` (float32, scalar) what its mean counts in the mean over the processes: ``n_ranks * n_mine / n_all``. Where there
    are fewer texts than processes, one without a text of its own computes another's, with share 0.

    Args:
        split: the tokenised texts.
        budget: tokens of a process's batch, padding included.
        seed: with the epoch, the source of order; None keeps one order.
        rank: this process among ``n_ranks``.
        n_ranks: processes.
    """

    def __init__(self, split: Tokenised, budget: int, seed: int | None, rank: int = 0, n_ranks: int = 1) -> None:
        self.split, self.budget, self.seed = split, budget, seed
        self.rank, self.n_ranks = rank, n_ranks
        self.epoch = 0
        self._n_batches = len(plan_batches(split.lengths, budget * n_ranks, None))
        self._done = 0
        self._skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next pass takes."""
        self.epoch = epoch

    def plan(self) -> list[np.ndarray]:
        """The current epoch's batches, all processes' together: arrays of places, int64."""
        rng = None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        return plan_batches(self.split.lengths, self.budget * self.n_ranks, rng)

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = self.plan()
        self._done, self._skip = self._skip, 0
        for places in batches[self._done :]:
            self._done += 1
            mine = places[self.rank :: self.n_ranks]
            share = self.n_ranks * len(mine) / len(places)
            yield {**self.split.batch(mine if len(mine) else places[:1]), "share": torch.tensor(share)}

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been handed out."""
        return {"epoch": self.epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begins the next pass where the saved one stood; a pass that was finished is not begun again."""
        self.epoch = state["epoch"]
        self._skip = state["done"] % len(self)
