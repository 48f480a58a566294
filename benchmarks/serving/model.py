"""The bundle's ONNX model as a user of another server would call it, without SoDaOps."""

import json
import os
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Model:
    """Predicts labels; ``n_threads`` threads compute each call."""

    def __init__(self, n_threads: int) -> None:
        folder = Path(os.environ["BUNDLE"])
        info = json.loads((folder / "bundle.json").read_text())
        self.labels = info["labels"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(info["max_tokens"])
        self.tokenizer.enable_padding(pad_id=info["pad_token_id"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        self.session = onnxruntime.InferenceSession(str(folder / os.environ["ONNX"]), options)

    def __call__(self, texts: list[str]) -> list[dict]:
        """Label and score of each text."""
        encoded = self.tokenizer.encode_batch(texts)
        feed = {
            "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
            "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
        }
        logits = self.session.run(["logits"], feed)[0]
        powers = np.exp(logits - logits.max(1, keepdims=True))
        probs = powers / powers.sum(1, keepdims=True)
        return [{"label": self.labels[row.argmax()], "score": float(row.max())} for row in probs]
