"""The OpenAPI schema of the predictor: FastAPI's, with limits, labels, errors and keys that routes do not declare."""

from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from sodaops.bundle.reference import MAX_CELL_CHARS
from sodaops.inference.predictor import Predictor
from sodaops.serving import abstention, schemas
from sodaops.serving.settings import ServeSettings
from sodaops.web.guard import OPEN

_ERRORS = {status: HTTPStatus(status).phrase for status in (400, 401, 403, 404, 408, 409, 413, 415, 429, 431, 500, 503, 504)}
_ERRORS[422] = "The request does not match this schema, or nothing is left of a text after cleaning, such as of HTML entities."
# What every cleaning removes: white space, control characters, invisible ones. A text needs another character.
_NOT_EMPTY = r"[^\s\x00-\x1f\x7f-\x9f\u200b\u2060\ufeff]"
_CONTEXT = "Slice column -> value, for drift by segment."
_ANSWERS = ("LabelResponse", "TextResponse", "Explanation")


def schema(app: FastAPI, settings: ServeSettings, predictor: Predictor) -> dict[str, Any]:
    """The schema, with the fields of the bundle's predictions.

    Args:
        app: the application with its routes.
        settings: its limits and keys.
        predictor: of the bundle in use.
    """
    document = app.openapi_schema
    if document is None:
        document = app.openapi_schema = get_openapi(
            title=app.title, version=version("sodaops"), description="Predictions for texts from a bundle.", routes=app.routes
        )
        _add_limits(document, settings)
        _add_errors_and_keys(document, bool(settings.api_keys))
    parts, labels = document["components"]["schemas"], predictor.info.labels
    answer = TypeAdapter(predictor.task.prediction_class).json_schema()
    changed = {name: _with_answer(parts[name], answer) for name in _ANSWERS}
    chosen = {"FeedbackRequest": _answer_type(predictor.task.question, labels), "ExplanationRequest": {"enum": [*labels, None]}}
    for name, kind in chosen.items():
        of = parts[name]["properties"]
        label = {key: of["label"][key] for key in ("title", "description")} | kind
        changed[name] = parts[name] | {"properties": of | {"label": label}}
    has_thresholds, has_sets = abstention.has(predictor)
    off = {*(() if has_thresholds else ("abstain", "reason")), *(() if has_sets else ("sets", "label_set"))}
    for name in (*_ANSWERS, "TextRequest", "BatchRequest"):  # without what this bundle never answers
        part = changed.get(name, parts[name])
        own = off if name != "Explanation" else {"abstain", "reason", "label_set"}
        changed[name] = part | {"properties": {key: of for key, of in part["properties"].items() if key not in own}}
    values = {key: {"type": "string", "maxLength": MAX_CELL_CHARS} for key in predictor.info.slice_columns}
    context = [{"type": "object", "properties": values, "additionalProperties": False}, {"type": "null"}]
    for name in ("TextRequest", "ExplanationRequest", "BatchRequest"):
        of = changed.get(name, parts[name])
        changed[name] = of | {"properties": of["properties"] | {"context": {"description": _CONTEXT, "anyOf": context}}}
    return document | {"components": document["components"] | {"schemas": parts | changed}}


def _with_answer(response: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    own = {name: response.get(name, kind()) for name, kind in (("properties", dict), ("required", list))}
    return response | {
        "properties": answer["properties"] | own["properties"], "required": [*answer.get("required", []), *own["required"]],
    }  # fmt: skip


def _answer_type(question: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """The JSON schema of a person's answer."""
    if question["kind"] == "number":
        limits = {"minimum": question.get("min"), "maximum": question.get("max")}
        return {"type": "number", **{name: limit for name, limit in limits.items() if limit is not None}}
    label = {"type": "string", "enum": list(labels), "examples": labels[:1]}
    return label if question["kind"] == "choice" else {"type": "array", "items": label, "uniqueItems": True}


def _add_limits(document: dict[str, Any], settings: ServeSettings) -> None:
    text = {"minLength": 1, "maxLength": settings.max_chars, "pattern": _NOT_EMPTY}
    parts = document["components"]["schemas"]
    texts = parts["BatchRequest"]["properties"]["texts"]
    texts["maxItems"] = settings.max_request_texts
    query = [parameter["schema"] for parameter in document["paths"]["/predict"]["get"]["parameters"]]
    if "Text" in parts:  # of several columns, of which one may be empty
        for place in (*parts["Text"]["properties"].values(), *query):
            place["maxLength"] = settings.max_chars
        return
    requests = [parts[name]["properties"]["text"] for name in ("TextRequest", "ExplanationRequest")]
    for place in (*requests, texts["items"], *query):
        place.update(text)


def _add_errors_and_keys(document: dict[str, Any], needs_key: bool) -> None:
    """Adds the errors that any route can return, and the two ways to send a key."""
    document["components"]["schemas"]["Problem"] = schemas.Problem.model_json_schema()
    document["components"]["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "bearer": {"type": "http", "scheme": "bearer"},
    }
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith("/admin/") or (needs_key and path not in OPEN):
                operation["security"] = [{"key": []}, {"bearer": []}]
            operation["responses"] |= {
                str(status): {"description": description, "content": content} for status, description in _ERRORS.items()
            }
