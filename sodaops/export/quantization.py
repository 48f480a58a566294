"""8-bit matrix products: a float32 ONNX graph with int8 weights and one activation scale per token.

ONNX Runtime's own dynamic quantization takes one activation scale for a whole batch, so that a text's prediction depends on
its neighbours, by up to 0.16 of a probability on the tweets (docs/serving.md). With one scale per token (W8A8 per-token
quantization: Yao et al. 2022, ZeroQuant) a text is predicted alike in every batch, and nearer to float32.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# Weights use seven bits: the sum of two products of an unsigned and a signed byte then fits into the 16 bits in which
# processors without VNNI add them, and all processors give the same result.
_WEIGHT_MAX = 63
_ACTIVATION_MAX = 127
_TABLE_MAX = 127
_ZERO_POINT = 128  # the unsigned byte that stands for an activation of 0
_TABLE_ROWS = 1000  # embedding tables with fewer rows stay in float32


def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces matrix products with constant weights, and large embedding tables, by 8-bit ones.

    ``y = x W`` becomes ``y[i] = s[i] * t * (q(x[i]) Q)`` with ``s[i] = max|x[i]| / 127`` and ``q(x[i]) = round(x[i] / s[i])``
    for token i, and ``t[j] = max|W[:, j]| / 63`` and ``Q[:, j] = round(W[:, j] / t[j])`` for column j of W.

    Args:
        model: float32; changed in place.

    Returns:
        The same model.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.value_info}
    constants: dict[str, TensorProto] = {}  # new initializers by name, each made once
    nodes: list[NodeProto] = []
    made: set[str] = set()  # activations that are quantized already, and shapes whose zero points are made
    replaced = set()
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            x, weight = node.input
            if x not in made:  # queries, keys and values are products of the same activations
                nodes += _activation(x, shapes.get(x), constants, made)
            nodes += _product(node, numpy_helper.to_array(weights[weight]), constants)
            replaced.add(weight)
        elif node.op_type == "Gather" and node.input[0] in weights and weights[node.input[0]].dims[0] >= _TABLE_ROWS:
            nodes += _lookup(node, numpy_helper.to_array(weights[node.input[0]]), constants)
            replaced.add(node.input[0])
        else:
            nodes.append(node)
    # Drop the float32 weights that no node reads any more.
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in replaced or tensor.name in read]
    kept += constants.values()
    # Shapes are not needed to run a graph, and those of new values are unknown.
    for field, values in ((graph.node, nodes), (graph.initializer, kept), (graph.value_info, [])):
        del field[:]
        field.extend(values)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _activation(x: str, shape: tuple | None, constants: dict[str, TensorProto], made: set[str]) -> Iterator[NodeProto]:
    """Nodes for the bytes ``x/bytes`` and scales ``x/scale`` [..., 1] of activations x [..., width].

    The scale of a token of zeros is 0 and its bytes are undefined; multiplied by that scale, its product is 0 again.
    """
    node = helper.make_node
    rows = "x".join(map(str, shape[:-1])) if shape else x  # zero points depend on the shape alone: values share them
    is_flat = shape is not None and len(shape) == 2  # as packed tokens are
    made.add(x)
    # scale[i] = max|x[i]| / 127
    yield node("Abs", [x], [f"{x}/abs"])
    yield node("ReduceMax", [f"{x}/abs", _constant(constants, "q/last", np.array([-1]))], [f"{x}/max"], keepdims=1)
    yield node("Mul", [f"{x}/max", _constant(constants, "q/step", np.float32(1 / _ACTIVATION_MAX))], [f"{x}/scale"])
    yield node("Reshape", [f"{x}/scale", _constant(constants, "q/last", np.array([-1]))], [f"{x}/scales"])
    # One zero point for each scale, since QuantizeLinear wants as many.
    if f"q/zeros/{rows}" not in made:
        zero = helper.make_tensor("zero", TensorProto.UINT8, [1], [_ZERO_POINT])
        yield node("Shape", [f"{x}/scales"], [f"q/rows/{rows}"])
        yield node("ConstantOfShape", [f"q/rows/{rows}"], [f"q/zeros/{rows}"], value=zero)
        made.add(f"q/zeros/{rows}")
    # bytes[i] = round(x[i] / scale[i]) + 128. QuantizeLinear takes its scales along one axis, so that activations with
    # more than two are made two-dimensional before, and get their shape back after it.
    if not is_flat:
        yield node("Shape", [x], [f"{x}/shape"])
        yield node("Flatten", [x], [f"{x}/rows"], axis=-1)
    source, target = (x, f"{x}/bytes") if is_flat else (f"{x}/rows", f"{x}/flat")
    yield node("QuantizeLinear", [source, f"{x}/scales", f"q/zeros/{rows}"], [target], axis=0)
    if not is_flat:
        yield node("Reshape", [target, f"{x}/shape"], [f"{x}/bytes"])


def _product(matmul: NodeProto, weight: np.ndarray, constants: dict[str, TensorProto]) -> Iterator[NodeProto]:
    """Nodes for the product of quantized activations with a weight [width, n_columns]."""
    (x, name), y = matmul.input, matmul.output[0]
    scale, quantized = _quantized(weight, 0, _WEIGHT_MAX)
    # MatMulIntegerToFloat multiplies by the columns' scales too, and takes one scale for all activations: 1 here, since
    # each token's own follows.
    inputs = [
        f"{x}/bytes",
        _constant(constants, f"{name}/bytes", quantized),
        _constant(constants, "q/one", np.float32(1)),
        _constant(constants, f"{name}/scale", scale[0]),
        _constant(constants, "q/zero", np.uint8(_ZERO_POINT)),
    ]
    yield helper.make_node("MatMulIntegerToFloat", inputs, [f"{y}/unscaled"], domain="com.microsoft")
    yield helper.make_node("Mul", [f"{y}/unscaled", f"{x}/scale"], [y])


def _lookup(gather: NodeProto, table: np.ndarray, constants: dict[str, TensorProto]) -> Iterator[NodeProto]:
    """Nodes for the rows of an embedding table [n_rows, width] with one scale per row."""
    (name, ids), y = gather.input, gather.output[0]
    scale, quantized = _quantized(table, 1, _TABLE_MAX)
    yield helper.make_node("Gather", [_constant(constants, f"{name}/bytes", quantized), ids], [f"{y}/bytes"])
    yield helper.make_node("Gather", [_constant(constants, f"{name}/scale", scale), ids], [f"{y}/scale"])
    yield helper.make_node("Cast", [f"{y}/bytes"], [f"{y}/unscaled"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{y}/unscaled", f"{y}/scale"], [y])


def _constant(constants: dict[str, TensorProto], name: str, value: np.ndarray | np.generic) -> str:
    """Adds a constant if it is new, and returns its name."""
    constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
    return name


def _quantized(matrix: np.ndarray, axis: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """The float32 scales along an axis, kept as one of length 1, and the matrix in int8 from -largest to largest."""
    scale = np.abs(matrix).max(axis=axis, keepdims=True) / largest
    scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)  # not 0, where all are 0
    return scale, np.rint(matrix / scale).astype(np.int8)
