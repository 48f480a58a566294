"""What tutorials show: FastAPI around a transformers pipeline, with every text padded to the same length."""

import os

from fastapi import FastAPI
from transformers import pipeline

app = FastAPI()
classify = pipeline("text-classification", model=os.environ["HF_MODEL"])
PADDING = {"padding": "max_length", "max_length": 78, "truncation": True}


@app.get("/predict")
def predict(text: str) -> dict:
    """One text per call of the pipeline."""
    return classify(text, **PADDING)[0]
