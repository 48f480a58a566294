"""A float32 ONNX graph that computes no padding: what works on one token at a time sees the tokens of a batch in one row.

A batch of texts of mixed lengths is padded to its longest. The matrix products, normalisations and activations of a
transformer take each token by itself, so they need none of it; attention alone looks across tokens, and gets the padded
form back. (The idea is that of Zeng et al. 2022, Boosting Distributed Training Performance of the Unpadded BERT Model.)
Texts of any length then share a batch without waste.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

_BY_TOKEN = {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Gelu", "Tanh", "Relu", "Sigmoid", "LayerNormalization"}
_TOKENS = ("batch", "tokens")
_ROW, _PLACE = "packing/row", "packing/place"


def pack(model: onnx.ModelProto) -> onnx.ModelProto:
    """Lets every matrix product of tokens with constant weights, and what depends on it token by token, skip padding.

    Args:
        model: float32, with shapes for its values and an input ``attention_mask`` [batch, tokens]; changed in place.

    Returns:
        The same model.
    """
    graph = model.graph
    constants = {tensor.name: tensor.dims for tensor in graph.initializer}
    shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.value_info}
    packed: set[str] = set()  # values that have a packed form
    padded = {value.name for value in graph.input} | set(constants)  # and those that have a padded one
    nodes: list[NodeProto] = []
    for node in graph.node:
        tokens = [name for name in node.input if _of_tokens(shapes.get(name))]
        product = node.op_type == "MatMul" and tokens == node.input[:1] and len(constants.get(node.input[1], ())) == 2
        by_token = node.op_type in _BY_TOKEN and _alone(node, tokens, shapes, constants)
        if product or (by_token and packed.intersection(tokens)):
            for name in set(tokens) - packed:
                nodes.append(helper.make_node("GatherND", [name, _PLACE], [f"{name}/packed"]))
            packed |= {*tokens, *node.output}
            nodes.append(_renamed(node, {name: f"{name}/packed" for name in (*tokens, *node.output)}))
        else:
            for name in packed.intersection(node.input) - padded:
                nodes.append(helper.make_node("Gather", [f"{name}/packed", _ROW], [name]))
                padded.add(name)
            padded |= set(node.output)
            nodes.append(node)
    if packed:
        nodes = [*_indices(graph), *nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.value_info.extend(
        helper.make_tensor_value_info(f"{name}/packed", onnx.TensorProto.FLOAT, ["n_tokens", shapes[name][-1]])
        for name in sorted(packed)
    )
    return model


def _of_tokens(shape: tuple | None) -> bool:
    return shape is not None and len(shape) == 3 and shape[:2] == _TOKENS


def _alone(node: NodeProto, tokens: list[str], shapes: dict[str, tuple], constants: dict) -> bool:
    """Whether each row of the output comes from the same row of the inputs, and from vectors or numbers."""
    rest = [name for name in node.input if name and name not in tokens]
    axis = next((a.i for a in node.attribute if a.name == "axis"), -1)
    widths = {shapes[name] for name in (*tokens, *node.output)} if all(o in shapes for o in node.output) else ()
    return len(widths) == 1 and axis == -1 and all(len(constants.get(name, (0, 0))) <= 1 for name in rest)


def _renamed(node: NodeProto, names: dict[str, str]) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    made.input[:] = [names.get(name, name) for name in node.input]
    made.output[:] = [names.get(name, name) for name in node.output]
    return made


def _indices(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """``place`` int64 [n_tokens, 2], text and position of each token; ``row`` int64 [batch, tokens], its inverse. A
    padding's row is some token's: attention gives it no weight, and nothing else sees it."""
    constant = {"flat": [-1], "zero": 0, "one": 1}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), f"packing/{k}") for k, v in constant.items())
    node = helper.make_node
    yield node("NonZero", ["attention_mask"], ["packing/nonzero"])
    yield node("Transpose", ["packing/nonzero"], [_PLACE], perm=[1, 0])
    yield node("Reshape", ["attention_mask", "packing/flat"], ["packing/mask"])
    yield node("CumSum", ["packing/mask", "packing/zero"], ["packing/count"])
    yield node("Sub", ["packing/count", "packing/one"], ["packing/last"])
    yield node("Shape", ["attention_mask"], ["packing/shape"])
    yield node("Reshape", ["packing/last", "packing/shape"], [_ROW])
