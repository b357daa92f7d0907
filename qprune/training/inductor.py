"""How inductor compiles training steps for a CPU: options that fit a step with operators better than its defaults.

Imported only where something is compiled: it loads the compiler.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._functorch.partitioners import default_partition
from torch._inductor import list_options
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx import Graph, Node

_ATEN = torch.ops.aten


class KeepAsAutograd(CustomPartitionerFn):
    """Keeps for the backward pass what autograd keeps, and computes nothing twice.

    By default memory is weighed against computing again, for which all is taken that stands before and after the
    operators, a tanh among it. An uncompiled step keeps as much as this.
    """

    def __call__(self, gm: Any, joint_inputs: Any, **options: Any) -> Any:
        """The forward and the backward graph of `gm`, which holds both."""
        drop_masks_behind_relus(gm.graph)
        sum_bias_gradients(gm.graph)
        return default_partition(
            gm,
            joint_inputs,
            num_fwd_outputs=options["num_fwd_outputs"],
            static_lifetime_input_indices=options.get("static_lifetime_input_indices"),
        )

    def uuid(self) -> bytes:
        """Part of the key under which compiled graphs are stored: another text of this file, other graphs."""
        return get_hash_for_files((__file__,))


def drop_masks_behind_relus(graph: Graph) -> int:
    """Leave out, in a graph of forward and backward pass, masks that gradients are multiplied by to no effect.

    Where a ReLU reads a feature that was masked and quantized, its gradient is zero wherever the mask is: zeros stay
    zeros from the mask to the ReLU. Clamped to the grid's range (Eq. 2) and masked again, it would be the same bits.
    Returns how many there were.
    """
    useless = [node for node in graph.nodes if _is_masked_to_no_effect(node)]
    for node in useless:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return len(useless)


def sum_bias_gradients(graph: Graph) -> None:
    """Have gradients of convolutions' biases computed as sums of their own, which the compiler fuses with what is near.

    The library sums them beside the weights' gradients, slowly.
    """
    for node in list(graph.nodes):
        if not _calls(node, _ATEN.convolution_backward.default) or not node.args[-1][2]:
            continue
        gradient, *others, wanted = node.args
        node.args = (gradient, *others, [*wanted[:2], False])
        for bias in [user for user in node.users if user.target is operator.getitem and user.args[1] == 2]:
            with graph.inserting_before(node):
                total = graph.call_function(
                    _ATEN.sum.dim_IntList, (gradient, [0, *range(2, gradient.meta["val"].dim())])
                )
            total.meta.update(bias.meta)
            bias.replace_all_uses_with(total)
            graph.erase_node(bias)


def _is_masked_to_no_effect(node: Node) -> bool:
    """Whether `node` is clamped gradient * mask, and the mask leaves no more of it than the ReLU it came through."""
    if not _calls(node, _ATEN.mul.Tensor) or not isinstance(mask := node.args[1], Node):
        return False
    passed = _argument(_argument(node.args[0], _ATEN.clamp_max.Tensor), _ATEN.clamp_min.Tensor)
    if not _calls(passed, _ATEN.where.self) or not _is_zero(passed.args[1]):
        return False
    stopped = passed.args[0]
    relu = _argument(stopped, _ATEN.le.Scalar)
    return _calls(relu, _ATEN.relu.default) and stopped.args[1] == 0 and _is_zero_where(relu, mask)


# Functions of one tensor that make zeros of zeros.
_KEEP_ZEROS = (
    _ATEN.relu.default,
    _ATEN.trunc.default,
    _ATEN.frac.default,
    _ATEN.floor.default,
    _ATEN.round.default,
    *(_ATEN.abs.default, _ATEN.sign.default),  # torch 2.11 computes fractions by these
)


def _is_zero_where(value: Any, mask: Node) -> bool:
    """Whether `value` was made of a product with mask * 2^d (as `quantize` makes it) in ways that keep zeros."""
    if _calls(value, _ATEN.mul.Tensor):
        one, other = map(_seen_through, value.args)
        if one is mask:
            return bool(_calls(_argument(other, _ATEN.view.dtype), _ATEN.__lshift__.Scalar))  # a power of two
        return _is_zero_where(one, mask) or _is_zero_where(other, mask)
    if _calls(value, _ATEN.sub.Tensor):
        return all(_is_zero_where(_seen_through(part), mask) for part in value.args)
    keeps = any(_calls(value, kind) for kind in _KEEP_ZEROS)
    keeps = keeps or (_calls(value, _ATEN.clamp_min.default) and value.args[1] <= 0)
    keeps = keeps or (_calls(value, _ATEN.clamp_max.default) and value.args[1] >= 0)
    return keeps and _is_zero_where(_seen_through(value.args[0]), mask)


def _is_zero(value: Any) -> bool:
    return (_calls(value, _ATEN.full.default) and value.args[1] == 0) or (
        _calls(value, _ATEN.scalar_tensor.default) and value.args[0] == 0
    )


def _calls(value: Any, target: Any) -> bool:
    return isinstance(value, Node) and value.target is target


def _argument(value: Any, target: Any) -> Any:
    """The first argument of `value`, if it is a call of `target`."""
    return _seen_through(value.args[0]) if _calls(value, target) else None


def _seen_through(value: Any) -> Any:
    """What `value` is another name of."""
    while _calls(value, _ATEN.alias.default):
        value = value.args[0]
    return value


def options_on_a_cpu() -> dict[str, Any]:
    """The options, as far as this torch has them."""
    wanted = {
        "custom_partitioner_fn": KeepAsAutograd(),
        # Backward passes too compute in channels last. Otherwise a convolution's gradient is laid out by the strides of
        # its weight's, which for one input channel per group say nothing, and is copied twice: 14 % of MobileNetV2.
        "force_layout_optimization": True,
        "cpp.use_decompose_tanh": True,  # by way of the exponential: half the time of the library's tanh
    }
    known = set(list_options())
    return {name: value for name, value in wanted.items() if name in known}
