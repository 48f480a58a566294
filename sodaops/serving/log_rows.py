"""What the request log has of an answered text."""

import hashlib
from typing import Any

import numpy as np

from sodaops.inference.predictor import Predictor
from sodaops.serving.batcher import ModelOutput
from sodaops.serving.settings import ServeSettings
from sodaops.text.cleaning import clean
from sodaops.text.columns import each
from sodaops.text.redaction import redact


def prediction_fields(
    predictor: Predictor, cleaned: str, row: np.ndarray, prediction: Any, output: ModelOutput
) -> dict[str, Any]:
    """Columns of the request log for one answered text, without the text itself.

    Args:
        predictor: the predictor that answered.
        cleaned: the cleaned text.
        row: its token ids, int64 [n_tokens].
        prediction: its prediction.
        output: from which it was made; without a sketch for a bundle without a drift reference.
    """
    label, score = predictor.task.logged(prediction)
    return {
        "label": label,
        "score": score,
        "probs": output.probs.tolist(),
        "n_tokens": len(row),
        "text_sha256": hashlib.sha256(cleaned.encode()).hexdigest(),
        "sketch": None if output.sketch is None else np.round(output.sketch, 3).tolist(),
        **predictor.descriptors(cleaned, row)._asdict(),
        **({"abstained": predictor.reason(prediction) is not None} if predictor.has_thresholds else {}),
    }


def loggable(text: str, predictor: Predictor, settings: ServeSettings) -> str | None:
    """The raw text, redacted as configured; None if texts are not logged.

    The text is cleaned before, since HTML entities or invisible characters could hide what must be redacted.
    """
    if not settings.log_texts:
        return None
    text, n_columns = text.encode("utf-8", "replace").decode(), len(predictor.info.text_columns)
    return each(text, n_columns, lambda part: redact(clean(part), settings.redact)) if settings.redact else text
