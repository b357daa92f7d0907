"""How inductor compiles training steps for a CPU: options that fit a step with operators better than its defaults.

Imported only where something is compiled: it loads the compiler.
"""

from __future__ import annotations

from typing import Any

from torch._functorch.partitioners import default_partition
from torch._inductor import list_options
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files


class KeepAsAutograd(CustomPartitionerFn):
    """Keeps for the backward pass what autograd keeps, and computes nothing twice.

    By default memory is weighed against computing again, for which all is taken that stands before and after the
    operators, a tanh among it. An uncompiled step keeps as much as this.
    """

    def __call__(self, gm: Any, joint_inputs: Any, **options: Any) -> Any:
        """The forward and the backward graph of `gm`, which holds both."""
        return default_partition(
            gm,
            joint_inputs,
            num_fwd_outputs=options["num_fwd_outputs"],
            static_lifetime_input_indices=options.get("static_lifetime_input_indices"),
        )

    def uuid(self) -> bytes:
        """Part of the key under which compiled graphs are stored: another text of this file, other graphs."""
        return get_hash_for_files((__file__,))


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
