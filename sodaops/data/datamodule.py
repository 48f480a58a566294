"""The LightningDataModule, which tokenises the splits once."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import lightning as L
import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer

from sodaops.config.schema import Config
from sodaops.data.batching import Tokenised, TokenLoader
from sodaops.data.preprocess import read_split
from sodaops.data.tokens import MANY_CUT, tokenise
from sodaops.errors import DataError, some
from sodaops.tasks.base import Task
from sodaops.tasks.make import SINGLE_LABEL

log = logging.getLogger(__name__)
_USUAL_TOKENS, _FEW_STEPS = 768, 20  # the default of optim.batch_tokens; fewer steps per epoch cause a note
_MIN_EPOCHS, _MAX_EPOCHS, _ENOUGH_STEPS = 3, 10, 100  # by cross-validation, docs/your_data.md


class TextDataModule(L.LightningDataModule):
    """Train and validation batches of the splits in ``config.splits_dir``.

    Args:
        config: the whole configuration; data, model.limit, optim, trainer and seed are used.
        tokenizer: the tokenizer of the model.
        pad_token_id: the token that pads a batch.
        labels: in order.
        task: reads the targets; with train it gets parameters, see :meth:`Task.fitted_on_train`.
        taught: more cleaned texts for train; and for the train rows and them, a teacher's answers, float32
            [n_train + n_texts, n_labels], and embeddings, float32 [n_train + n_texts, width], or None.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, pad_token_id: int, labels: Sequence[str], task: Task = SINGLE_LABEL,
        taught: tuple[Sequence[str], np.ndarray, np.ndarray | None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.taught = taught
        self.config, self.tokenizer = config, tokenizer
        self.pad_token_id, self.labels, self.task = pad_token_id, labels, task
        self.splits: dict[str, Tokenised] = {}
        self._balanced_weights: Callable[[], np.ndarray]
        self.cut_shares: dict[str, float] = {}  # split -> share of its texts that are longer than model.limit
        self._train: TokenLoader | None = None
        self._resumed: dict[str, int] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises train and val, once."""
        for split in ("train", "val"):
            if split not in self.splits:
                self.splits[split] = self._tokenised(split)

    def _tokenised(self, split: str) -> Tokenised:
        """Tokenises a split; texts without tokens, which a service refuses, are left out."""
        table, limit = read_split(self.config.splits_dir, split), self.config.model.limit
        if not table.num_rows:
            raise DataError(f"{split}: has no rows; data.fractions={self.config.data.fractions} is for an evaluation.")
        tokens = tokenise(self.tokenizer, table["text"].to_pylist(), limit)
        kept = tokens.kept
        if tokens.is_empty.any():
            empty = table.filter(pa.array(tokens.is_empty))
            where = [f"{row['source']} row {row['row']}" for row in empty.to_pylist()]
            log.warning("%s: %d texts have no tokens and are left out: %s", split, empty.num_rows, some(where))
            table = table.take(kept)
            if not table.num_rows:
                raise DataError(f"{split}: no text has tokens; choose a model for texts of this language (model.name_or_path).")
            tokens = tokenise(self.tokenizer, table["text"].to_pylist(), limit)
        self.cut_shares[split] = float(tokens.is_cut.mean())
        if split == "train":
            self.task = self.task.fitted_on_train(self.task.truth(table))
        truth, targets = self.task.truth(table), self.task.targets(table, self.labels, self.config.optim)
        own = Tokenised(tokens.ids, tokens.offsets, truth, targets, self.pad_token_id, limit)
        if split != "train":
            return own
        self._balanced_weights = partial(self.task.balanced_weights, truth, len(self.labels))
        return own if self.taught is None else self._with_answers(own, kept, *self.taught)

    def _with_answers(
        self, own: Tokenised, kept: np.ndarray, texts: Sequence[str], answers: np.ndarray, embeddings: np.ndarray | None
    ) -> Tokenised:
        """The train rows, int64 ``kept`` of them, with the teachers' answers in their targets, and the texts without labels."""
        weight, targets = self.config.distill.weight, own.targets
        soft = self.task.soft_targets(answers)
        n_train = len(soft) - len(texts)
        has_answer = ~np.isnan(answers).any(axis=tuple(range(1, answers.ndim)))
        mixed = np.where(has_answer[kept], weight, 0).reshape(-1, *[1] * (targets.ndim - 1)).astype(np.float32)
        targets = (1 - mixed) * targets + mixed * np.nan_to_num(soft[kept])
        more = tokenise(self.tokenizer, texts, own.limit)
        usable = np.flatnonzero(has_answer[n_train:] & ~more.is_empty)
        rows = more.rows
        lengths = np.concatenate([np.diff(own.offsets), np.diff(more.offsets)[usable]])
        return replace(
            own,
            tokens=np.concatenate([own.tokens, *(rows[i] for i in usable)]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            truth=np.concatenate([own.truth, np.zeros((len(usable), *own.truth.shape[1:]), own.truth.dtype)]),  # not read
            targets=np.concatenate([targets, soft[n_train:][usable]]),
            embeddings=None if embeddings is None else embeddings[np.concatenate([kept, n_train + usable])],
        )

    def log_cut_shares(self) -> None:
        """Logs how many texts are cut, as a warning if they are many."""
        limit = self.config.model.limit
        shares = ", ".join(f"{share:.1%} of {split}" for split, share in self.cut_shares.items())
        many = max(self.cut_shares.values()) > MANY_CUT
        fix = "set model.long_texts=windows" if limit.max_windows is None else "raise model.max_windows"
        hint = f"; the rest of them is not read, so {fix} if the label may depend on it" if many else ""
        bound = "" if limit.max_windows is None else f" model.max_windows={limit.max_windows}"
        level = logging.WARNING if many else logging.INFO
        log.log(level, "texts cut at model.max_tokens=%d%s: %s%s", limit.max_tokens, bound, shares, hint)

    def balanced_weights(self) -> torch.Tensor:
        """Weights that give all labels the same total, float32 [n_labels]."""
        return torch.from_numpy(self._balanced_weights())

    def enough_epochs(self, n_processes: int) -> int:
        """What ``trainer.max_epochs=auto`` stands for: 3, or up to 10 where these have fewer than 100 steps."""
        n_steps = self._n_steps(n_processes)
        n_epochs = min(_MAX_EPOCHS, max(_MIN_EPOCHS, math.ceil(_ENOUGH_STEPS / n_steps)))
        log.info("trainer.max_epochs=auto: %d epochs, with %d steps each", n_epochs, n_steps)
        return n_epochs

    def _n_steps(self, n_processes: int) -> int:
        """Optimizer steps in an epoch over the whole table."""
        return math.ceil(self._n_batches(n_processes) / self.batches_per_step(n_processes))

    def _n_batches(self, n_processes: int) -> int:
        return len(TokenLoader(self.splits["train"], self.config.optim.batch_tokens, None, n_ranks=n_processes))

    def batches_per_step(self, n_processes: int) -> int:
        """Batches whose gradients are accumulated: ``trainer.accumulate_grad_batches``, or those of ``optim.batch_texts``."""
        wanted = self.config.optim.batch_texts
        if wanted is None:
            return self.config.trainer.get("accumulate_grad_batches") or 1
        return max(1, round(wanted * self._n_batches(n_processes) / len(self.splits["train"].truth)))

    def log_batches_per_step(self, n_processes: int) -> int:
        """Logs and returns :meth:`batches_per_step` for ``optim.batch_texts``."""
        n_batches = self.batches_per_step(n_processes)
        n_texts = n_batches * len(self.splits["train"].truth) / self._n_batches(n_processes)
        message = "optim.batch_texts=%d: %d batches, with about %.0f texts, per optimizer step"
        log.info(message, self.config.optim.batch_texts, n_batches, n_texts)
        return n_batches

    def few_steps_note(self, n_processes: int) -> str | None:
        """A note if large batches, as in the presets for GPUs, leave few steps per epoch on a small table; else None."""
        budget, usual = self.config.optim.batch_tokens, max(_USUAL_TOKENS, self.config.model.max_tokens)
        n_steps = self._n_steps(n_processes)
        if n_steps >= _FEW_STEPS or budget <= usual:
            return None
        by = f" in each of {n_processes} processes" if n_processes > 1 else ""
        return f"note: optim.batch_tokens={budget}{by} gives {n_steps} steps per epoch; {usual} would give more"

    def train_dataloader(self) -> TokenLoader:
        """Training batches, shuffled by seed and epoch; in a fixed order with trainer.overfit_batches."""
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0
        self._train = self._loader("train", None if overfit else self.config.seed)
        if self._resumed is not None:
            self._train.load_state_dict(self._resumed)
            self._resumed = None
        return self._train

    def state_dict(self) -> dict[str, int]:
        """The position in the training batches. Lightning would save it as well, but restores it only to loaders that are
        created after its loops, and computing the number of steps creates them before."""
        if self._train is None:
            return {}
        finished = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch  # the next pass starts at the first batch
        return {**self._train.state_dict(), "done": 0} if finished else self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restores the position, at the next :meth:`train_dataloader`."""
        self._resumed = state_dict

    def val_dataloader(self) -> TokenLoader:
        """Validation batches in a fixed order."""
        return self._loader("val", None)

    def _loader(self, split: str, seed: int | None) -> TokenLoader:
        rank, n_ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return TokenLoader(self.splits[split], self.config.optim.batch_tokens, seed, rank, n_ranks)
