"""The least that FastAPI and ONNX Runtime can do: no checks, no metrics, no log. Its cold start is a floor for any of ours."""

from fastapi import FastAPI
from model import Model

app = FastAPI()
classify = Model(n_threads=1)


@app.get("/predict")
def predict(text: str) -> dict:
    """One text."""
    return classify([text])[0]
