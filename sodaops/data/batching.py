"""A tokenised split, and the loader that gives its batches to Lightning."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sodaops.data.tokens import batch_inputs, padded_lengths, plan_batches
from sodaops.text.limit import Limit


@dataclass(frozen=True)
class Tokenised:
    """A split as arrays: text i has the tokens ``tokens[offsets[i]:offsets[i + 1]]``."""

    tokens: np.ndarray  # int32 [n_tokens]
    offsets: np.ndarray  # int64 [n_examples + 1]
    truth: np.ndarray  # [n_examples, ...], what metrics compare with; int64 [n_examples] for label ids
    targets: np.ndarray  # float32 [n_examples, ...], what the loss compares with
    pad_token_id: int
    limit: Limit  # of the texts
    embeddings: np.ndarray | None = None  # float32 [n_examples, width], a teacher's, NaN where it has none

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text in a batch, int64 [n_examples]."""
        return padded_lengths(self.offsets, self.limit)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The texts with these indices (int64 [n]), padded to the longest of them.

        Returns:
            The inputs of the model, as :func:`sodaops.data.tokens.batch_inputs` gives them; truth, [n, ...]; targets, float32
            [n, ...]; and embeddings, float32 [n, width], where there are any.
        """
        rows = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        return {
            **{name: torch.from_numpy(x) for name, x in batch_inputs(rows, self.pad_token_id, self.limit).items()},
            "truth": torch.from_numpy(self.truth[indices]),
            "targets": torch.from_numpy(self.targets[indices]),
            **({} if self.embeddings is None else {"embeddings": torch.from_numpy(self.embeddings[indices])}),
        }


class TokenLoader:
    """Padded batches of a split, which Lightning can resume within an epoch.

    With several processes, each global batch holds up to ``n_ranks`` budgets, and a process takes every n_ranks-th of its
    texts. All processes have the same number of batches, and every text is in one of them. ``share`` (float32, scalar) in a
    batch is its weight in the mean over the processes: ``n_ranks * n_local / n_global``. A process without a text of its own
    computes another's, with share 0.

    Args:
        split: the tokenised texts.
        budget: tokens of a process's batch, padding included.
        seed: seeds the order, together with the epoch; None: always the same order.
        rank: the rank of this process.
        n_ranks: number of processes.
    """

    def __init__(self, split: Tokenised, budget: int, seed: int | None, rank: int = 0, n_ranks: int = 1) -> None:
        self.split, self.budget, self.seed = split, budget, seed
        self.rank, self.n_ranks = rank, n_ranks
        self.epoch = 0
        self._n_batches = len(plan_batches(split.lengths, budget * n_ranks, None))
        self._done = 0
        self._skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that determines the order of the next pass."""
        self.epoch = epoch

    def plan(self) -> list[np.ndarray]:
        """The current epoch's global batches: the indices of their texts, int64."""
        rng = None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        return plan_batches(self.split.lengths, self.budget * self.n_ranks, rng)

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = self.plan()
        self._done, self._skip = self._skip, 0
        for indices in batches[self._done :]:
            self._done += 1
            local = indices[self.rank :: self.n_ranks]
            share = self.n_ranks * len(local) / len(indices)
            yield {**self.split.batch(local if len(local) else indices[:1]), "share": torch.tensor(share)}

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were yielded."""
        return {"epoch": self.epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues the saved pass; after a finished one the next pass starts at the first batch."""
        self.epoch = state["epoch"]
        self._skip = state["done"] % len(self)
