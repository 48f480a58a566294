"""Composes the configuration that a build's arguments ask for, so that a misspelt key is reported before the training.

It runs in the train image: python cloudbuild/compose.py TRAIN_ARGS [GATE_ARGS]
"""

import os
import shlex
import sys

if __name__ == "__main__":
    # This command validates the whole configuration (`train --cfg job` does not) and reads only an empty folder.
    os.execvp("sodaops", ["sodaops", "registry", "list", *(part for text in sys.argv[1:] for part in shlex.split(text))])
