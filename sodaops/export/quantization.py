"""Quantizes an ONNX model: weights and embedding tables in int8, activations in uint8 with one scale per token.

ONNX Runtime's own dynamic quantization uses one activation scale for a whole batch, so that a text's probabilities depend on
the other texts, by up to 0.16 on the tweets (docs/serving.md). With one scale per token (Yao et al. 2022, ZeroQuant), a text
gets the same probabilities in every batch, and they are closer to those of float32.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# Weights have seven bits, because processors without VNNI add two products of an unsigned and a signed byte in 16 bits: with
# eight bits the sum could overflow, and the result would depend on the processor.
_WEIGHT_MAX = 63
_ACTIVATION_MAX = 127
_TABLE_MAX = 127
_ZERO_POINT = 128  # the uint8 value of an activation of 0
_MIN_TABLE_ROWS = 1000  # smaller embedding tables stay in float32


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Quantizes the matrix products with constant weights, and the large embedding tables.

    ``y = x W`` becomes ``y[i, j] = s[i] * t[j] * (p[i] Q[:, j])``, where ``p[i] = round(x[i] / s[i])`` with
    ``s[i] = max|x[i]| / 127`` for token i, and ``Q[:, j] = round(W[:, j] / t[j])`` with ``t[j] = max|W[:, j]| / 63``.

    Args:
        model: float32; changed in place.

    Returns:
        The same model.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.value_info}
    constants: dict[str, TensorProto] = {}  # new initializers by name
    nodes: list[NodeProto] = []
    made: set[str] = set()  # names of the activations and zero points that have nodes already
    replaced = set()
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            x, weight = node.input
            if x not in made:  # queries, keys and values share their activations
                nodes += _activation_nodes(x, shapes.get(x), constants, made)
            nodes += _product_nodes(node, numpy_helper.to_array(weights[weight]), constants)
            replaced.add(weight)
        elif node.op_type == "Gather" and node.input[0] in weights and weights[node.input[0]].dims[0] >= _MIN_TABLE_ROWS:
            nodes += _lookup_nodes(node, numpy_helper.to_array(weights[node.input[0]]), constants)
            replaced.add(node.input[0])
        else:
            nodes.append(node)
    # Remove the float32 weights that no node reads any more.
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced or tensor.name in read]
    kept += constants.values()
    # Remove the shapes: those of new values are unknown, and running a graph does not need them.
    for field, values in ((graph.node, nodes), (graph.initializer, kept), (graph.value_info, [])):
        del field[:]
        field.extend(values)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _activation_nodes(x: str, shape: tuple | None, constants: dict[str, TensorProto], made: set[str]) -> Iterator[NodeProto]:
    """Nodes that quantize activations x [..., width] to ``x/bytes``, with scales ``x/scale`` [..., 1].

    If all values of a token are 0, its bytes are undefined, but its scale is 0, so that its products are 0 too.
    """
    node = helper.make_node
    rows = "x".join(map(str, shape[:-1])) if shape else x  # activations of one shape share zero points
    is_flat = shape is not None and len(shape) == 2  # packed tokens
    made.add(x)
    # scale[i] = max|x[i]| / 127
    yield node("Abs", [x], [f"{x}/abs"])
    yield node("ReduceMax", [f"{x}/abs", _constant(constants, "q/last", np.array([-1]))], [f"{x}/max"], keepdims=1)
    yield node("Mul", [f"{x}/max", _constant(constants, "q/step", np.float32(1 / _ACTIVATION_MAX))], [f"{x}/scale"])
    yield node("Reshape", [f"{x}/scale", _constant(constants, "q/last", np.array([-1]))], [f"{x}/scales"])
    # One zero point for each scale, as QuantizeLinear requires.
    if f"q/zeros/{rows}" not in made:
        zero = helper.make_tensor("zero", TensorProto.UINT8, [1], [_ZERO_POINT])
        yield node("Shape", [f"{x}/scales"], [f"q/rows/{rows}"])
        yield node("ConstantOfShape", [f"q/rows/{rows}"], [f"q/zeros/{rows}"], value=zero)
        made.add(f"q/zeros/{rows}")
    # bytes[i] = round(x[i] / scale[i]) + 128. QuantizeLinear takes scales along one axis, so activations with more than two
    # dimensions are flattened before it and reshaped after it.
    if not is_flat:
        yield node("Shape", [x], [f"{x}/shape"])
        yield node("Flatten", [x], [f"{x}/rows"], axis=-1)
    source, target = (x, f"{x}/bytes") if is_flat else (f"{x}/rows", f"{x}/flat")
    yield node("QuantizeLinear", [source, f"{x}/scales", f"q/zeros/{rows}"], [target], axis=0)
    if not is_flat:
        yield node("Reshape", [target, f"{x}/shape"], [f"{x}/bytes"])


def _product_nodes(matmul: NodeProto, weight: np.ndarray, constants: dict[str, TensorProto]) -> Iterator[NodeProto]:
    """Nodes for the product of quantized activations with a weight [width, n_columns]."""
    (x, name), y = matmul.input, matmul.output[0]
    scale, quantized = _scales_and_int8(weight, 0, _WEIGHT_MAX)
    # MatMulIntegerToFloat multiplies by the scales of the columns and by one scale for all activations, which is 1 here; the
    # scales of the tokens follow in a node of their own.
    inputs = [
        f"{x}/bytes",
        _constant(constants, f"{name}/bytes", quantized),
        _constant(constants, "q/one", np.float32(1)),
        _constant(constants, f"{name}/scale", scale[0]),
        _constant(constants, "q/zero", np.uint8(_ZERO_POINT)),
    ]
    yield helper.make_node("MatMulIntegerToFloat", inputs, [f"{y}/unscaled"], domain="com.microsoft")
    yield helper.make_node("Mul", [f"{y}/unscaled", f"{x}/scale"], [y])


def _lookup_nodes(gather: NodeProto, table: np.ndarray, constants: dict[str, TensorProto]) -> Iterator[NodeProto]:
    """Nodes that look up rows of an embedding table [n_rows, width], which has one scale per row."""
    (name, ids), y = gather.input, gather.output[0]
    scale, quantized = _scales_and_int8(table, 1, _TABLE_MAX)
    yield helper.make_node("Gather", [_constant(constants, f"{name}/bytes", quantized), ids], [f"{y}/bytes"])
    yield helper.make_node("Gather", [_constant(constants, f"{name}/scale", scale), ids], [f"{y}/scale"])
    yield helper.make_node("Cast", [f"{y}/bytes"], [f"{y}/unscaled"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{y}/unscaled", f"{y}/scale"], [y])


def _constant(constants: dict[str, TensorProto], name: str, value: np.ndarray | np.generic) -> str:
    """Adds a constant if it is new, and returns its name."""
    constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
    return name


def _scales_and_int8(matrix: np.ndarray, axis: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """The float32 scales along an axis, which keeps length 1, and the int8 matrix with values up to ``largest``."""
    scale = np.abs(matrix).max(axis=axis, keepdims=True) / largest
    scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)  # avoids a division by 0
    return scale, np.rint(matrix / scale).astype(np.int8)
