"""Progress in logs, and which messages the command line shows."""

import logging
import re
import sys

import pytest

from sodaops.cli.console import configure_logging
from sodaops.io import progress


@pytest.fixture
def lines(monkeypatch, caplog):
    """The messages of progress, which are logged at every step."""
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO, "sodaops")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("sodaops")]


def test_a_line_from_time_to_time_without_a_terminal(lines):
    with progress.progress(desc="reading", total=4_000, unit="text", initial=1_000) as bar:
        bar.update(1_500)
        bar.update(1_500)
    first, last = lines()
    assert first.startswith("reading: 2,500 of 4,000 texts, ") and first.endswith(" left")
    assert last.startswith("reading: 4,000 of 4,000 texts, ") and last.endswith(" 0 s left")
    assert list(progress.progress("ab", "gate", unit="rule")) == ["a", "b"] and len(lines()) == 4
    assert lines()[2].startswith("gate: 1 of 2 rules, ")


def test_nothing_before_the_time_has_come(lines, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 3600.0)
    progress.progress(desc="reading", unit="text").update(5)
    assert lines() == []


@pytest.mark.parametrize(
    ("limit", "of", "n_lines"), [({"max_epochs": 2}, "/2", 6), ({"max_epochs": -1, "max_steps": 4}, "", 4)]
)
def test_lines_of_a_training(lines, tmp_path, limit, of, n_lines):
    import lightning as L
    import torch

    from sodaops.training.progress import StepLines

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch["targets"]).mean()
            self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=4)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    batches = [{"targets": torch.ones(4, 2)}] * 3
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[StepLines()], **quiet, **limit).fit(Model(), loader)
    shown = [line for line in lines() if " step " in line]
    assert len(shown) == n_lines
    pattern = rf"epoch \d{of}  step (\d)/3  loss -?[0-9.]+  [0-9]+ examples/s  \d+ s left"
    assert [re.fullmatch(pattern, line)[1] for line in shown] == [str(n % 3 + 1) for n in range(n_lines)]


def test_messages_of_the_users_own_code_are_shown_and_those_of_libraries_are_not(capsys):
    configure_logging()
    configure_logging()
    logging.getLogger("mine").info("by me")
    logging.info("by me, too")
    logging.getLogger("mine.module").warning("careful")
    logging.getLogger("sodaops.x").info("ours")
    library = f"{sys.prefix}/lib/python3/site-packages/library/module.py"
    for level, text in [(logging.INFO, "noise"), (logging.WARNING, "by a library")]:
        logging.getLogger("library").handle(logging.LogRecord("library", level, library, 1, text, (), None))
    assert capsys.readouterr().err.splitlines() == ["by me", "by me, too", "warning: careful", "ours", "warning: by a library"]
