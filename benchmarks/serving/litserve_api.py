"""LitServe with the same ONNX model: N_WORKERS workers that share the cores, and batches of up to MAX_BATCH texts."""

import os

import litserve
from model import Model

MAX_BATCH = int(os.environ["MAX_BATCH"])


class Api(litserve.LitAPI):
    """One model in each worker."""

    def setup(self, device: str) -> None:
        """Loads the model."""
        self.model = Model(n_threads=int(os.environ["N_CORES"]) // int(os.environ["N_WORKERS"]))

    def decode_request(self, request: dict) -> str:
        """The text."""
        return request["text"]

    def predict(self, texts: list[str] | str) -> list[dict] | dict:
        """A batch, or one text if batching is off."""
        return self.model(texts) if MAX_BATCH > 1 else self.model([texts])[0]

    def encode_response(self, output: dict) -> dict:
        """The output, unchanged."""
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["N_WORKERS"]))
    server.run(port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
