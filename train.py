"""Trains a model: `python train.py model=distilbert trainer.max_epochs=3`. The same as `sodaops train`."""

import sys

from sodaops.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
