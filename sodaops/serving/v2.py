"""KServe's Open Inference Protocol (v2) over HTTP, with the binary tensors that Triton's clients send.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol

Each column of a text is an input of type BYTES. Each field of a prediction is an output: text is BYTES, a number FP32, a truth
value BOOL, label -> probability FP32 [n, n_labels], anything else JSON as BYTES.
"""

import functools
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, FailFast, Field, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from sodaops.inference.predictor import Predictor
from sodaops.serving.abstention import Asked, resolve, with_fields
from sodaops.serving.schemas import faults
from sodaops.serving.service import Service
from sodaops.text.columns import join

_LENGTH = "inference-header-content-length"
_DATATYPES = {"f": "FP32", "b": "BOOL", "O": "BYTES"}  # kind of a numpy dtype -> datatype


class Parameters(BaseModel, strict=True):
    """Mostly of the binary tensor data extension. Others are ignored, except for two that would change the answer."""

    binary_data_size: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    binary_data: bool | None = None
    binary_data_output: bool = False
    abstain: bool | None = None  # of a request, as in POST /predict
    sets: bool = False
    shared_memory_region: None = None
    classification: None = None


class OutputTensor(BaseModel, strict=True):
    """An output that is asked for."""

    name: str
    parameters: Parameters = Parameters()


class InputTensor(OutputTensor):
    """The texts, or a column of them."""

    shape: Annotated[list[int], FailFast()]
    datatype: str
    data: Annotated[list[str | list[str]], FailFast()] = []


class InferRequest(BaseModel, strict=True):
    """A request for inference; without outputs, for all of them."""

    id: str | None = None
    parameters: Parameters = Parameters()
    inputs: Annotated[list[InputTensor], FailFast()]
    outputs: Annotated[list[OutputTensor], FailFast()] = []


def add_routes(app: FastAPI, service: Service, predict: Callable[..., Awaitable[tuple[Any, Any]]]) -> None:
    """Adds the protocol's routes to an application. The bundle is the one model; its id is the version.

    They are not in the OpenAPI schema: the protocol has its own, and JSON Schema cannot describe bodies with binary tensors.
    ``predict`` returns predictions as dictionaries, and a dictionary with the ``bundle_version`` that answered.
    """
    name = service.settings.model_name

    def chosen(request: Request) -> Predictor:
        predictor, asked = service.models.current, request.path_params
        bundle_id = predictor.info.bundle_id
        if asked["name"] != name or asked.get("version", bundle_id) != bundle_id:
            raise HTTPException(404, f"no such model or version; this service has {name}, version {bundle_id}")
        return predictor

    async def server() -> dict[str, Any]:
        return {"name": "sodaops", "version": version("sodaops"), "extensions": ["binary_tensor_data"]}

    async def health() -> dict[str, Any]:
        service.batcher.check_workers()
        return {"live": True, "ready": True}

    async def model(request: Request) -> dict[str, Any]:
        return {"name": name, **_metadata(chosen(request), Asked(service.settings.abstain))}

    async def model_ready(request: Request) -> dict[str, Any]:
        chosen(request)
        service.batcher.check_workers()
        return {"name": name, "ready": True}

    async def infer(request: Request) -> Response:
        predictor = chosen(request)
        asked, texts = _read(await request.body(), request.headers.get(_LENGTH), predictor.info.text_columns)
        fields = Asked(asked.parameters.abstain, asked.parameters.sets)
        if asked.outputs:
            _check_outputs(asked, _example(predictor, resolve(fields, service.settings.abstain, predictor)))
        predictions, ids = await predict(request, texts, fields)
        answer = {"model_name": name, "model_version": ids["bundle_version"], **({"id": asked.id} if asked.id else {})}
        return _response(answer, _tensors(predictions), asked)

    add = functools.partial(app.add_api_route, include_in_schema=False)
    add("/v2", server)
    add("/v2/health/live", health)
    add("/v2/health/ready", health)
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        add(path, model)
        add(f"{path}/ready", model_ready)
        add(f"{path}/infer", infer, methods=["POST"])


def _example(predictor: Predictor, asked: Asked) -> dict[str, np.ndarray]:
    """The outputs for one text."""
    n_labels = len(predictor.info.labels)
    prediction = predictor.prediction(np.full(n_labels, 1 / n_labels, np.float32))
    return _tensors(with_fields(predictor, [prediction], asked))


def _metadata(predictor: Predictor, asked: Asked) -> dict[str, Any]:
    labels = predictor.info.labels
    outputs = [
        {"name": name, "datatype": _DATATYPES[tensor.dtype.kind], "shape": [-1, *tensor.shape[1:]]}
        | ({"parameters": {"labels": json.dumps(labels)}} if tensor.ndim > 1 else {})
        for name, tensor in _example(predictor, asked).items()
    ]
    inputs = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in predictor.info.text_columns]
    return {"versions": [predictor.info.bundle_id], "platform": "onnxruntime_onnx", "inputs": inputs, "outputs": outputs}


def _read(body: bytes, json_length: str | None, columns: Sequence[str]) -> tuple[InferRequest, list[str]]:
    """The request and its raw texts, if it matches the protocol and the model's inputs."""
    end = len(body) if json_length is None else int(json_length) if re.fullmatch("[0-9]{1,15}", json_length) else 0
    try:
        request = InferRequest.model_validate_json(body[:end])
    except ValidationError as error:
        raise HTTPException(400, faults(error.errors())) from None
    if sorted(tensor.name for tensor in request.inputs) != sorted(columns):
        raise HTTPException(400, f"inputs: expected {', '.join(columns)}, each once")
    parts = {}
    for tensor in request.inputs:
        size = tensor.parameters.binary_data_size or 0
        parts[tensor.name] = _elements(tensor, body[end : end + size])
        end += size
    if end != len(body):
        raise HTTPException(400, f"the body has {len(body)} bytes; its lengths add up to {end}")
    if len({*map(len, parts.values())}) > 1:
        raise HTTPException(400, "inputs: their shapes differ")
    return request, [join(texts) for texts in zip(*(parts[name] for name in columns), strict=True)]


def _elements(tensor: InputTensor, data: bytes) -> list[str]:
    """The texts of an input: from JSON, or from binary data, in which each has its length, uint32, before it."""
    place = f"inputs.{tensor.name}"
    if tensor.datatype != "BYTES" or tensor.shape[:1] < [1] or any(size != 1 for size in tensor.shape[1:]):
        raise HTTPException(400, f"{place}: expected the datatype BYTES, and the shape [n] or [n, 1] with at least one text")
    texts, end = [text for row in tensor.data for text in ([row] if isinstance(row, str) else row)], 0
    while end < len(data):
        start = end + 4
        end = start + int.from_bytes(data[end:start], "little")
        try:
            texts.append(data[start:end].decode())
        except UnicodeDecodeError:
            raise HTTPException(400, f"{place}: text {len(texts) + 1} is not UTF-8") from None
    if end != len(data) or len(texts) != tensor.shape[0]:
        raise HTTPException(400, f"{place}: {len(texts)} texts, perhaps cut; its shape says {tensor.shape[0]}")
    return texts


def _tensors(predictions: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Field -> its values: float32 [n] or [n, n_labels], bool [n], or str as object [n]."""
    return {name: _tensor([prediction.get(name) for prediction in predictions]) for name in predictions[0]}


def _tensor(values: list[Any]) -> np.ndarray:
    if isinstance(values[0], dict):
        return np.array([list(value.values()) for value in values], np.float32)
    if isinstance(values[0], bool | float):
        return np.array(values, np.bool_ if isinstance(values[0], bool) else np.float32)
    texts = ["" if v is None else v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return np.array(texts, object)


def _check_outputs(request: InferRequest, tensors: dict[str, np.ndarray]) -> None:
    if not {output.name for output in request.outputs} <= tensors.keys() or len(request.outputs) > len(tensors):
        raise HTTPException(400, f"outputs: expected some of {', '.join(tensors)}")


def _response(answer: dict[str, Any], tensors: dict[str, np.ndarray], request: InferRequest) -> Response:
    asked = request.outputs or [OutputTensor(name=name) for name in tensors]
    outputs, binary = [], b""
    for output in asked:
        tensor, is_binary = tensors[output.name], output.parameters.binary_data
        fields = {"name": output.name, "datatype": _DATATYPES[tensor.dtype.kind], "shape": tensor.shape}
        if is_binary or (is_binary is None and request.parameters.binary_data_output):
            data = tensor.astype("<f4" if tensor.dtype == np.float32 else tensor.dtype).tobytes()
            if tensor.dtype == object:
                data = b"".join(len(text).to_bytes(4, "little") + text for text in map(str.encode, tensor))
            binary += data
            outputs.append({**fields, "parameters": {"binary_data_size": len(data)}})
        else:
            outputs.append({**fields, "data": tensor.ravel().tolist()})
    head = to_json({**answer, "outputs": outputs})
    headers = {_LENGTH: str(len(head))} if binary else {}
    return Response(head + binary, headers=headers, media_type=f"application/{'octet-stream' if binary else 'json'}")
