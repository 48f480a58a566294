"""A float32 ONNX graph that computes nothing for padding.

A batch of texts of mixed lengths is padded to the longest of them. Matrix products, normalisations and activations treat
each token alone, so they can run on the tokens of the batch in one row, [n_tokens, width]: the packed form. Only attention
relates tokens to each other; it gets the padded form, [batch, tokens, width], back. Texts of any length then share a batch
without waste (Zeng et al. 2022, Boosting Distributed Training Performance of the Unpadded BERT Model).
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

# Operators that compute each element, or each row of the last axis, alone.
_BY_TOKEN = {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Gelu", "Tanh", "Relu", "Sigmoid", "LayerNormalization"}
_TOKENS = ("batch", "tokens")
_ROW, _PLACE = "packing/row", "packing/place"


def pack(model: onnx.ModelProto) -> onnx.ModelProto:
    """Packs every matrix product of tokens with constant weights, and what depends on it token by token.

    Args:
        model: float32, with shapes for its values and an input ``attention_mask`` [batch, tokens]; changed in place.

    Returns:
        The same model.
    """
    graph = model.graph
    constants = {tensor.name: tensor.dims for tensor in graph.initializer}
    shapes = {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.value_info}
    packed: set[str] = set()  # values that have a packed form
    padded = {value.name for value in graph.input} | set(constants)  # values that have a padded one
    nodes: list[NodeProto] = []
    for node in graph.node:  # in topological order: the inputs of a node are made before it
        tokens = [name for name in node.input if _is_of_tokens(shapes.get(name))]
        is_product = node.op_type == "MatMul" and tokens == node.input[:1] and len(constants.get(node.input[1], ())) == 2
        if is_product or (packed.intersection(tokens) and _is_by_token(node, tokens, shapes, constants)):
            # Pack the inputs that are padded only, and let the node read and write packed forms.
            for name in set(tokens) - packed:
                nodes.append(helper.make_node("GatherND", [name, _PLACE], [f"{name}/packed"]))
            packed |= {*tokens, *node.output}
            nodes.append(_renamed(node, {name: f"{name}/packed" for name in (*tokens, *node.output)}))
        else:
            # The node stays; pad the inputs that are packed only.
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


def _is_of_tokens(shape: tuple | None) -> bool:
    """Whether a value is padded tokens, [batch, tokens, width]."""
    return shape is not None and len(shape) == 3 and shape[:2] == _TOKENS


def _is_by_token(node: NodeProto, tokens: list[str], shapes: dict[str, tuple], constants: dict) -> bool:
    """Whether each token of the output depends on the same token of the inputs, and on constant vectors or numbers alone."""
    if node.op_type not in _BY_TOKEN or not all(name in shapes for name in node.output):
        return False
    others = [name for name in node.input if name and name not in tokens]
    # One shape means that nothing is broadcast along batch or tokens; a missing constant counts as a matrix.
    one_shape = len({shapes[name] for name in (*tokens, *node.output)}) == 1
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)
    return one_shape and axis == -1 and all(len(constants.get(name, (0, 0))) <= 1 for name in others)


def _renamed(node: NodeProto, names: dict[str, str]) -> NodeProto:
    """A copy of a node with other names for its inputs and outputs."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy


def _indices(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Nodes for the two indices, which depend on the attention mask alone.

    ``place`` int64 [n_tokens, 2] is text and position of each packed token; ``row`` int64 [batch, tokens] is its inverse.
    The row of a padding is that of some token: attention gives it no weight, and nothing else reads it.
    """
    constants = {"flat": [-1], "zero": 0, "one": 1}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), f"packing/{k}") for k, v in constants.items())
    node = helper.make_node
    # place: the coordinates of the ones in the mask, one token a row.
    yield node("NonZero", ["attention_mask"], ["packing/nonzero"])
    yield node("Transpose", ["packing/nonzero"], [_PLACE], perm=[1, 0])
    # row: the number of ones up to and with this position, minus one, in the mask read row by row.
    yield node("Reshape", ["attention_mask", "packing/flat"], ["packing/mask"])
    yield node("CumSum", ["packing/mask", "packing/zero"], ["packing/count"])
    yield node("Sub", ["packing/count", "packing/one"], ["packing/last"])
    yield node("Shape", ["attention_mask"], ["packing/shape"])
    yield node("Reshape", ["packing/last", "packing/shape"], [_ROW])
