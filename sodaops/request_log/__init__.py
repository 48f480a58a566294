"""The request log: what the predictor answered, kept for drift checks and annotation.

:mod:`journal` appends each answer to a local file before it is sent, :mod:`parts` turns closed journal files into Parquet,
:mod:`window` reads the newest rows or a span of time, and :mod:`retention` deletes old days and single requests.
"""
