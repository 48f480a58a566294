"""FastAPI and ONNX Runtime with nothing else: no checks, metrics or log. SoDaOps cannot start faster than this."""

from fastapi import FastAPI
from model import Model

app = FastAPI()
classify = Model(n_threads=1)


@app.get("/predict")
def predict(text: str) -> dict:
    """One text."""
    return classify([text])[0]
