"""LitServe with the same ONNX model, one text a call: N_WORKERS workers, each with its share of the cores."""

import os

import litserve
from model import Model


class Api(litserve.LitAPI):
    """One model in each worker."""

    def setup(self, device: str) -> None:
        """Loads it."""
        self.model = Model(n_threads=int(os.environ["N_CORES"]) // int(os.environ["N_WORKERS"]))

    def decode_request(self, request: dict) -> str:
        """The text."""
        return request["text"]

    def predict(self, text: str) -> dict:
        """One text."""
        return self.model([text])[0]

    def encode_response(self, output: dict) -> dict:
        """As it is."""
        return output


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=int(os.environ["N_WORKERS"]))
    server.run(port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
