"""8-bit matrix products: a float32 ONNX graph with its weights in int8 and one activation scale a token.

The quantiser that comes with ONNX Runtime takes one scale for a whole batch, so a text's answer depends on its
neighbours, by up to 0.16 of probability on the tweets (docs/serving.md). With a scale a token, as in W8A8 per-token
quantization (Yao et al. 2022, ZeroQuant), a text is answered the same in any company, and nearer to float32.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# Seven bits of weight: two products of an unsigned and a signed byte then fit the 16 bits in which processors without
# VNNI add them, and every processor gives the same answer.
_WEIGHT_MAX = 63
_ACTIVATION_MAX = 127
_ZERO = 128  # the byte that stands for an activation of 0
_TABLE_ROWS = 1000  # embeddings with fewer rows stay as they are


def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces matrix products with constant weights, and large embedding tables, by 8-bit ones.

    ``y = x W`` becomes ``y[i] = s[i] * t * (q(x[i]) Q)`` with ``s[i] = max|x[i]| / 127`` for token i and, for each
    column j of W, ``t[j] = max|W[:, j]| / 63``, ``Q = round(W / t)``.

    Args:
        model: float32; changed in place.

    Returns:
        The same model.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.value_info}
    pool = _Constants()
    nodes: list[NodeProto] = []
    done: set[str] = set()  # activations in bytes, and shapes: each made once
    replaced = set()
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            x = node.input[0]
            if x not in done:
                nodes += _activation(x, shapes.get(x), pool, done)
            nodes += _product(node, numpy_helper.to_array(weights[node.input[1]]), pool)
            replaced.add(node.input[1])
        elif node.op_type == "Gather" and node.input[0] in weights and weights[node.input[0]].dims[0] >= _TABLE_ROWS:
            nodes += _lookup(node, numpy_helper.to_array(weights[node.input[0]]), pool)
            replaced.add(node.input[0])
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced or tensor.name in read]
    kept += pool.tensors()
    for field, values in ((graph.node, nodes), (graph.initializer, kept), (graph.value_info, [])):
        del field[:]
        field.extend(values)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


class _Constants:
    """Initializers by name, each made once."""

    def __init__(self) -> None:
        self._made: dict[str, TensorProto] = {}

    def __call__(self, name: str, value: np.ndarray | np.generic) -> str:
        if name not in self._made:
            self._made[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def tensors(self) -> Iterable[TensorProto]:
        return self._made.values()


def _activation(x: str, shape: tuple | None, const: _Constants, done: set[str]) -> Iterator[NodeProto]:
    """Bytes ``x/bytes`` and scales ``x/scale`` [..., 1] of activations x [..., width].

    A scale of 0 makes undefined bytes, which the same 0 makes 0 again after the product.
    """
    node = helper.make_node
    rows = "x".join(map(str, shape[:-1])) if shape else x  # what depends on the shape alone is shared by its name
    flat = shape is not None and len(shape) == 2  # as packed tokens are
    done.add(x)
    yield node("Abs", [x], [f"{x}/abs"])
    yield node("ReduceMax", [f"{x}/abs", const("q/last", np.array([-1]))], [f"{x}/max"], keepdims=1)
    yield node("Mul", [f"{x}/max", const("q/step", np.float32(1 / _ACTIVATION_MAX))], [f"{x}/scale"])
    yield node("Reshape", [f"{x}/scale", const("q/last", np.array([-1]))], [f"{x}/scales"])
    if f"q/zeros/{rows}" not in done:
        zero = helper.make_tensor("zero", TensorProto.UINT8, [1], [_ZERO])
        yield node("Shape", [f"{x}/scales"], [f"q/rows/{rows}"])
        yield node("ConstantOfShape", [f"q/rows/{rows}"], [f"q/zeros/{rows}"], value=zero)
        done.add(f"q/zeros/{rows}")
    if not flat:
        yield node("Shape", [x], [f"{x}/shape"])
        yield node("Flatten", [x], [f"{x}/rows"], axis=-1)
    source, target = (x, f"{x}/bytes") if flat else (f"{x}/rows", f"{x}/flat")
    yield node("QuantizeLinear", [source, f"{x}/scales", f"q/zeros/{rows}"], [target], axis=0)
    if not flat:
        yield node("Reshape", [target, f"{x}/shape"], [f"{x}/bytes"])


def _product(matmul: NodeProto, weight: np.ndarray, const: _Constants) -> Iterator[NodeProto]:
    (x, name), y = matmul.input, matmul.output[0]
    scale = np.maximum(np.abs(weight).max(axis=0) / _WEIGHT_MAX, np.finfo(np.float32).tiny).astype(np.float32)
    inputs = [
        f"{x}/bytes",
        const(f"{name}/bytes", np.rint(weight / scale).astype(np.int8)),
        const("q/one", np.float32(1)),
        const(f"{name}/scale", scale),
        const("q/zero", np.uint8(_ZERO)),
    ]
    yield helper.make_node("MatMulIntegerToFloat", inputs, [f"{y}/unscaled"], domain="com.microsoft")
    yield helper.make_node("Mul", [f"{y}/unscaled", f"{x}/scale"], [y])


def _lookup(gather: NodeProto, table: np.ndarray, const: _Constants) -> Iterator[NodeProto]:
    (name, ids), y = gather.input, gather.output[0]
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    yield helper.make_node("Gather", [const(f"{name}/bytes", np.rint(table / scale).astype(np.int8)), ids], [f"{y}/bytes"])
    yield helper.make_node("Gather", [const(f"{name}/scale", scale), ids], [f"{y}/scale"])
    yield helper.make_node("Cast", [f"{y}/bytes"], [f"{y}/unscaled"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{y}/unscaled", f"{y}/scale"], [y])
