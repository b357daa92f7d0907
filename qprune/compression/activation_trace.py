"""Trace the feature tensors that a network stores: those that some layer reads, seen by running one example.

Elementwise operations and batch norms are taken to be fused with what makes their input, as inference engines do, so
the sum of a residual block is one stored tensor and its addends are none. A tensor is charged with the bits of the
quantizer whose grid it still lies on: ReLU, max pooling and moving elements about keep the grid, arithmetic leaves it.
It is charged with the mask of the pruner whose zeros it still has: any function with f(0) = 0 keeps those.

Parameters are followed to the functions that use them, so that a layer is recognized by what it does (a product with a
parameter) and what it is given is compared with what operators made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from qprune.compression.config import CONVOLUTIONS
from qprune.compression.operator import Operator
from qprune.compression.plan import INPUT, input_site
from qprune.compression.prepare import (
    FACTS,
    FeatureOperators,
    find_operators,
    run_example,
    samples_in,
    split_name,
    tensors_in,
    weight_path,
)
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer

FLOAT_BITS = 32
COMPUTE = (*CONVOLUTIONS, nn.Linear)
ATTENTION = (nn.MultiheadAttention,)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
TABLES = (nn.Embedding, nn.EmbeddingBag)
_KEEPS_GRID = ("relu", "relu_", "clamp_min", "hardtanh", "hardtanh_", "max_pool2d_with_indices", "pixel_shuffle", "cat")
# Elementwise with f(0) = 0, in place or not; those above that keep a grid do so too, but for pooling.
_KEEPS_ZEROS = ("tanh", "leaky_relu", "relu", "hardtanh", "gelu", "silu", "elu", "hardswish", "neg", "abs")
# A reflected rim repeats what is there and is made where it is read.
_MOVES = (
    *("clone", "contiguous", "_to_copy", "detach", "native_dropout", "alias", "_unsafe_view"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
)
_MOVES_OF_WEIGHTS = (*_MOVES, "cat", "stack", "flip", "index", "index_select", "constant_pad_nd", "select_scatter")
_PRODUCTS = (
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "bilinear", "_trilinear"),
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "_cudnn_rnn"),
)


def reads_sizes_alone(function: Any) -> bool:
    """Return whether a function of torch reads the size of a tensor and not its values."""
    name: str = function.overloadpacket.__name__
    return name.startswith("new_") or name.endswith("_like")


def is_product(function: str) -> bool:
    """Return whether a function of torch multiplies features by a matrix: products, convolutions, recurrent layers."""
    return function in _PRODUCTS or "conv" in function


@dataclass(frozen=True)
class WeightUse:
    """A parameter of two or more dimensions, on its way to a function.

    Attributes:
        path: Its site.
        operators: `prune` and `quantize`, those whose zeros and grid it has.
        changed_by: The function that computed another weight from it, or ''.
        used_by: The function that used it together with features, or ''.
    """

    path: str
    operators: frozenset[str] = frozenset()
    changed_by: str = ""
    used_by: str = ""


@dataclass(eq=False)
class Stored:
    """A feature tensor and how it was made.

    Attributes:
        name: The module that made it, or `input`.
        elements, bits, density: Its elements, bits per element and fraction of elements kept.
        operators: `prune` and `quantize`, those whose zeros and grid it has.
        made_by: The function that made it, by torch's name; '' for the network's input.
        within: The module in whose forward it was made.
        fused: Whether that function counts as part of the one that made its input.
        keeps: What a function of one tensor keeps of its input: `grid`, `zeros`.
        inputs: The tensors that it was made from.
        layer: Of a product with a parameter whose module is no layer of torch's: this module.
        floating: Whether its elements are floating point numbers; others are followed and not stored.
        whole: Whether it is made of whole numbers alone (pictures of bytes, one-hot vectors, padding): a feature once a
            product reads it.
        uses: Number of functions that received it.
        outputs: Paths of the modules that returned it, inner ones first, with the shape.
        readers: Paths of the modules in which something reads it.
    """

    name: str
    elements: int
    bits: int = FLOAT_BITS
    density: float = 1.0
    operators: frozenset[str] = frozenset()
    made_by: str = ""
    within: str = ""
    fused: bool = False
    keeps: frozenset[str] = frozenset()
    inputs: tuple[Stored, ...] = ()
    layer: str | None = None
    floating: bool = True
    whole: bool = False
    uses: int = 0
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)


def uncovered_features(network: nn.Module, example: Any) -> list[Stored]:
    """Return the stored features without mask or grid while every operator of `network` is active."""
    return [stored for stored in with_all_active(network, example).reads if not stored.operators]


def with_all_active(network: nn.Module, example: Any, samples: int | None = None) -> Trace:
    """Trace `example` through `network` with every operator active and every mask at its final sparsity."""
    # Those of features need not compute anything: the trace counts them as active all the same.
    operators = [placed.operator for placed in find_operators(network) if placed.chain is not None]
    before = [operator.active for operator in operators]
    try:
        for operator in operators:
            operator.active = True
        return Trace(network, final=True).run(example, samples)
    finally:
        for operator, active in zip(operators, before, strict=True):
            operator.active = active


def stored_features(network: nn.Module, example: Any) -> list[Stored]:
    """Return the feature tensors that layers of `network` read, each once, in order of first use."""
    return list(Trace(network).run(example).reads)


def parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Yield the site, the parameter and the module's path of all parameters of two or more dimensions."""
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            yield weight_path(name), parameter, split_name(name)[0]


@contextmanager
def _attention_by_its_parts() -> Iterator[None]:
    """Keep torch from computing attention in evaluation mode as one function that hides the tensors inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Trace(TorchDispatchMode):
    """Follows feature tensors through a network, without keeping them alive.

    Args:
        network: Any module.
        final: Whether features count as after training, with every operator and the final sparsity of masks.

    Attributes:
        reads: Tensors that something reads, in that order.
        output: What the network returned.
        results: The tensors in it.
        calls, shapes, passed: Number of calls of the module at a site, the shapes of the tensors there, and those of
            them that are features, by site: a module's path for its results, `path.input` for its first argument.
        layers: Paths of convolutions, linear layers, attention and modules of other kinds whose parameter is multiplied
            with a feature, in the order of their first call.
        used: How each weight was used, by its site.
        samples: Samples of the example, or None where its arguments do not agree.
        generated: Functions that `convert` made of the operators of a feature, with the facts that it left.
    """

    def __init__(self, network: nn.Module, final: bool = False) -> None:
        super().__init__()
        self.network, self.final = network, final
        self.modules = dict(network.named_modules())
        self.paths = {module: path for path, module in self.modules.items()}
        self.output: Any = None
        self.results: set[Stored] = set()
        self.calls: Counter[str] = Counter()
        self.shapes: dict[str, set[tuple[int, ...]]] = {}
        self.passed: dict[str, list[Stored]] = {}
        self.layers: list[str] = []
        self.used: dict[str, list[WeightUse]] = {}
        self.samples: int | None = None
        self.generated: dict[nn.Module, dict[str, Any]] = {}
        self.values = WeakTensorKeyDictionary()  # feature tensor -> Stored
        self.weights = WeakTensorKeyDictionary()  # tensor -> the Weights that it holds
        self.bases = WeakTensorKeyDictionary()  # view -> the tensor that it is a part of
        self.owners: dict[str, str] = {}  # site of a weight -> the layer that it belongs to
        self.reads: dict[Stored, None] = {}
        self.path: list[str] = []
        self.muted = 0
        for module in self.paths:
            children = dict(module.named_children())
            noted = getattr(module, FACTS, {})
            self.generated |= {children[name]: facts for name, facts in noted.items() if name in children}
        for site, parameter, owner in parameters(network):
            self.weights[parameter] = [*self.weights.get(parameter, ()), WeightUse(site)]
            if not isinstance(self.modules[owner], (*COMPUTE, *ATTENTION, *RECURRENT, *TABLES)):
                self.owners[site] = owner

    def run(self, example: Any, samples: int | None = None) -> Self:
        """Pass `example`, of so many `samples`, through the network, as `compress` does."""
        handles: list[RemovableHandle] = []
        for module in self.paths:
            leave = self._leave_generated if module in self.generated else self._leave
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            self.record(INPUT, example)
            with self, _attention_by_its_parts():
                self.output = run_example(self.network, example)
        finally:
            for handle in handles:
                handle.remove()
        self.samples = samples_in(example, self.output) if samples is None else samples
        for tensor in tensors_in(self.output):
            if tensor in self.values:
                self.results.add(self.values[tensor])
                self.read(tensor, note=False)
        return self

    def is_batch(self, shape: tuple[int, ...]) -> bool:
        """Return whether the first of several dimensions holds the example's samples."""
        return len(shape) >= 2 and shape[0] == self.samples

    def record(
        self, name: str, tensors: Any, like: Stored | None = None, grid: bool = True, zeros: bool = True, **origin: Any
    ) -> None:
        """Record new feature tensors, with the grid and the zeros of `like` as said; origin: further fields."""
        for tensor in tensors_in(tensors):
            stored = Stored(name, tensor.numel(), floating=tensor.is_floating_point(), **origin)
            if like is not None and grid:
                stored.bits = like.bits
                stored.operators |= like.operators & {"quantize"}
            if like is not None and zeros:
                stored.density = like.density
                stored.operators |= like.operators & {"prune"}
            self.values[tensor] = stored

    def read(self, tensor: Any, note: bool = True, product: bool = True) -> None:
        """Record a read of the tensor by the running module, or by the network's caller (note=False)."""
        stored = self.values.get(tensor)
        if stored is not None and stored.floating and (product or not stored.whole):
            self.reads[stored] = None
            if note:
                stored.readers.append(self.path[-1] if self.path else "")

    def _pass(self, site: str, tensor: Any) -> None:
        """Record a tensor at a site."""
        if isinstance(tensor, Tensor) and tensor in self.values and self.values[tensor].floating:
            self.passed.setdefault(site, []).append(self.values[tensor])
            self.shapes.setdefault(site, set()).add(tuple(tensor.shape))

    def _enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of every module."""
        path = self.paths[module]
        site_of_input = input_site(self.modules, path)
        self.path.append(path)
        self.calls.update((path, site_of_input))
        self._pass(site_of_input, args[0] if args else None)
        if isinstance(module, COMPUTE + ATTENTION) and path not in self.layers:
            self.layers.append(path)
        self.muted += module in self.generated or isinstance(module, (FeatureOperators, Operator))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a module, of operators too."""
        path = self.path.pop()
        operators: list[Any] = []
        if isinstance(module, (FeatureOperators, Operator)):
            self.muted -= 1
            operators = [module] if isinstance(module, Operator) else [module.pruner, module.quantizer]
        if self.muted or not isinstance(output, Tensor):
            return
        active = [operator for operator in operators if operator is not None and (self.final or operator.acts)]
        if active and args[0] in self.weights:
            made = {"prune" if isinstance(operator, Pruner) else "quantize" for operator in active}
            self.weights[output] = [replace(w, operators=w.operators | made) for w in self.weights[args[0]]]
        elif active and args[0] in self.values:
            self._operate(active, args[0], output)
        elif output in self.values:
            self.values[output].outputs[path] = tuple(output.shape)
            self._pass(path, output)

    def _leave_generated(self, function: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a function of `convert`, which is itself a hook: of (module, args) or of (..., output)."""
        self.path.pop()
        at_output = len(args) == 3
        before, after = (args[2], output) if at_output else (args[1][0], output[0])
        facts, operators = self.generated[function], list[Any]()
        if "mask" in facts:  # where the mask keeps it, the largest number is above zero on every grid
            full = torch.full_like(before[:1], torch.finfo(before.dtype).max)
            kept = function.forward(None, (), full) if at_output else function.forward(None, (full,))[0]
            pruner = Pruner()
            pruner.mask, pruner.sparsity = (kept[0] != 0).float(), 1 - facts["density"]
            operators.append(pruner)
        if "bits" in facts:
            operators.append(Quantizer(facts["bits"]))
        self.muted -= 1
        if not self.muted and before in self.values:
            self._operate(operators, before, after)

    def _operate(self, operators: list[Any], before: Tensor, after: Tensor) -> None:
        """Record what active operators made of a feature tensor."""
        stored = self.values[before]
        self.record(stored.name, after, stored, layer=stored.layer)
        made = self.values[after]
        for operator in operators:
            if isinstance(operator, Pruner):
                made.density = 1.0 - operator.sparsity
                if not self.final:
                    made.density = float(operator.fitted(before).expand(before.shape[1:]).mean(dtype=torch.float64))
                made.operators |= {"prune"}
            else:
                made.bits = operator.bits
                made.operators |= {"quantize"}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.muted or reads_sizes_alone(func):
            return out
        given = tensors_in((args, kwargs))
        name = func.overloadpacket.__name__
        if func.is_view and given:
            for tensor in tensors_in(out):
                self.bases[tensor] = self.bases.get(given[0], given[0])
        inputs = [self.values[tensor] for tensor in given if tensor in self.values]
        weights = [weight for tensor in given for weight in self.weights.get(tensor, ())]
        if weights:
            self._follow(weights, func, given, inputs, out)
        if inputs or "embedding" in name:  # a table's rows are features, whatever they were chosen by
            self._make(weights, func, args, inputs, out)
        if given and out is given[0] and out in self.values and out in self.bases:
            whole = self.bases[out]  # a part of it was written to
            self.values[whole] = replace(self.values[out], elements=whole.numel(), uses=0, outputs={}, readers=[])
        return out

    def _follow(self, weights: list[WeightUse], func: Any, given: list[Tensor], inputs: list[Stored], out: Any) -> None:
        """Record a use of weights, or what was computed of them alone."""
        name = func.overloadpacket.__name__
        others = [tensor for tensor in given if tensor not in self.weights]
        if inputs or "embedding" in name or (is_product(name) and others):
            for weight in weights:
                self.used.setdefault(weight.path, []).append(replace(weight, used_by=name))
                owner = self.owners.get(weight.path)
                if owner is not None and is_product(name) and not weight.changed_by and owner not in self.layers:
                    self.layers.append(owner)
            return
        masked = name in ("mul", "mul_") and others and all(bool(((t == 0) | (t == 1)).all()) for t in others)
        if not (func.is_view or name in _MOVES_OF_WEIGHTS or masked):
            kept = {"prune"} if name.removesuffix("_") in (*_KEEPS_ZEROS, "mul") else set()
            changed = (replace(w, operators=w.operators & kept, changed_by=w.changed_by or name) for w in weights)
            weights = list(dict.fromkeys(changed))
        for tensor in tensors_in(out):
            self.weights[tensor] = weights

    def _make(self, weights: list[WeightUse], func: Any, args: Any, inputs: list[Stored], out: Any) -> None:
        """Record the features that a function made of others, and that it read these."""
        name = func.overloadpacket.__name__
        inputs = [stored for stored in inputs if stored.floating] or inputs
        cast = bool(inputs) and not inputs[0].floating and any(t.is_floating_point() for t in tensors_in(out))
        if inputs and not cast and (func.is_view or name in _MOVES):
            for tensor in tensors_in(out):
                self.values[tensor] = inputs[0]
            return
        for stored in dict.fromkeys(inputs):
            stored.uses += 1
        product = is_product(name)
        batch_norm = "batch_norm" in name and not _uses_batch_statistics(args)
        fused = torch.Tag.pointwise in func.tags or batch_norm or (cast and name == "_to_copy")
        if not fused:
            for tensor in tensors_in(args):
                self.read(tensor, product=product)
        same_grid = name in _KEEPS_GRID and len({value.bits for value in inputs}) == 1
        same_zeros = name.removesuffix("_") in _KEEPS_ZEROS
        keeps = {"grid", "zeros"} if same_grid and name != "cat" else {"zeros"} if same_zeros else set()
        within = self.path[-1] if self.path else ""
        owners = [self.owners[w.path] for w in weights if product and not w.changed_by and w.path in self.owners]
        self.record(
            within or (inputs[0].name if inputs else ""),  # a function called in the network's own forward
            out,
            inputs[0] if inputs else None,
            grid=same_grid,
            zeros=same_zeros,
            made_by=name,
            within=within,
            fused=fused,
            keeps=frozenset(keeps),
            inputs=tuple(dict.fromkeys(inputs)),
            layer=next(iter(owners), None),
            whole=not (product or weights or "embedding" in name) and all(s.whole or not s.floating for s in inputs),
        )


def _uses_batch_statistics(args: Any) -> bool:
    flags = [value for value in args if isinstance(value, bool)]
    return bool(flags and flags[0])
