"""BentoML with the same ONNX model: adaptive batching, as its documentation advises."""

import os

import bentoml
from model import Model


@bentoml.service(workers=1, traffic={"timeout": 30})
class Classifier:
    """One worker; ONNX Runtime takes every core."""

    def __init__(self) -> None:
        self.model = Model(n_threads=int(os.environ["N_CORES"]))

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=1000)
    def predict(self, text: list[str]) -> list[dict]:
        """Texts that came together."""
        return self.model(text)
