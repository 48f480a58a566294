"""BentoML with the same ONNX model, and adaptive batching as its documentation recommends."""

import os

import bentoml
from model import Model


@bentoml.service(workers=1, traffic={"timeout": 30})
class Classifier:
    """One worker; ONNX Runtime uses all cores."""

    def __init__(self) -> None:
        self.model = Model(n_threads=int(os.environ["N_CORES"]))

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=1000)
    def predict(self, text: list[str]) -> list[dict]:
        """A batch of texts."""
        return self.model(text)
