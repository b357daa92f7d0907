"""Count what one pass of a network costs, layer by layer, with its static masks and zeros taken into account.

A network is traced once. Then each function is repeated on tensors of 0 and 1 that say which elements are kept, those
that no mask makes zero, so that groups, strides, padding and transposition count exactly: a CPU adds up to 2^24 of them
without an error in float32. An element is read if the sum of all that is read has a gradient there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from qprune.compression.activation_trace import FLOAT_BITS, Trace, reads_sizes_alone
from qprune.compression.fake_quantize import shaped_along
from qprune.compression.footprint import weights_of
from qprune.compression.prepare import tensors_in
from qprune.compression.pruner import Pruner

# Energies in pJ of M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, Fig. 1.1.9
# (45 nm, 0.9 V): a 32-bit product and sum of integers and of floats, and 64 bits from a cache of 1 MB.
_INTEGER_PRODUCT, _INTEGER_SUM, _FLOAT_MAC, _CACHE_BYTE = 3.1, 0.1, 3.7 + 0.9, 100 / 8

_PRODUCTS = {"convolution": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_HIDDEN_PRODUCTS = ("rnn", "lstm", "gru", "attention", "trilinear", "mv", "dot", "linear", "conv", "mm")
_SAME = ("clone", "contiguous", "_to_copy", "detach", "alias", "native_dropout")
# Functions that move elements or add them up with weights that are not negative: they do the same to what is kept.
_LINEAR = (
    *("cat", "stack", "constant_pad", "pixel_", "channel_shuffle", "reflection_pad", "replication_pad", "im2col"),
    *("avg_pool", "_adaptive_avg_pool", "mean", "sum", "upsample_nearest", "upsample_bilinear", "index_select"),
    *("upsample_trilinear", "upsample_linear", "roll", "flip", "repeat", "_unsafe_view"),
)
_MAX_POOLS = {"max_pool2d_with_indices": F.avg_pool2d, "max_pool3d_with_indices": F.avg_pool3d}


@dataclass(frozen=True)
class LayerCost:
    """What the products of one kind in one module cost, over all its calls.

    Attributes:
        name: The module's path.
        operation: `convolution`, or torch's name of the matrix product.
        macs: Multiply-accumulates, those with padding included, as `torch.utils.flop_counter` counts them.
        effective_macs: Those whose two factors are kept and whose sum is read: neither a zero weight, nor an element
            of a feature that a mask or padding makes zero, nor an output that a following mask removes.
        feature_bits: Bits of the first factor.
        weight_bits: Bits of the second factor.
        accumulator_bits: Bits, with the sign, in which no sum of products can overflow, whatever the input and the
            masks of features; a bias that is added there is not included. None where a factor is no integer.
        weight_bytes: Weights read, but those that are zero.
        feature_bytes: Features read and written, layer by layer, but elements that are zero or never read.
    """

    name: str
    operation: str
    macs: int
    effective_macs: int
    feature_bits: int
    weight_bits: int
    accumulator_bits: int | None
    weight_bytes: float
    feature_bytes: float

    @property
    def bops(self) -> int:
        """Return the bit operations, which are multiply-accumulates times the bits of both factors."""
        return self.macs * self.feature_bits * self.weight_bits

    @property
    def effective_bops(self) -> int:
        """Return the bit operations of the effective multiply-accumulates."""
        return self.effective_macs * self.feature_bits * self.weight_bits

    @property
    def energy_pj(self) -> float:
        """Return the energy in pJ of effective multiply-accumulates and of bytes moved by the model of `Cost`."""
        each = _FLOAT_MAC
        if self.accumulator_bits is not None:
            share = self.feature_bits * self.weight_bits / FLOAT_BITS**2
            each = _INTEGER_PRODUCT * share + _INTEGER_SUM * self.accumulator_bits / FLOAT_BITS
        return self.effective_macs * each + (self.weight_bytes + self.feature_bytes) * _CACHE_BYTE

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return asdict(self) | {name: getattr(self, name) for name in ("bops", "effective_bops", "energy_pj")}


_SUMS = ("macs", "effective_macs", "bops", "effective_bops", "weight_bytes", "feature_bytes", "energy_pj")


@dataclass(frozen=True)
class Cost:
    """The cost of one pass of an example; `print` shows a table.

    Energy is a model: M. Horowitz's table (ISSCC 2014, 45 nm) with integer products in proportion to the bits of both
    factors and sums to those of the accumulator, and every byte moved through a cache of 1 MB.

    Attributes:
        layers: Layers with products, in the order of their first call.
        uncounted: Functions whose products are not counted, with the modules that call them.
    """

    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...] = ()

    def total(self) -> dict[str, float]:
        """Return the sums over layers, and the widest accumulator where there is one."""
        sums: dict[str, float] = {name: sum(getattr(layer, name) for layer in self.layers) for name in _SUMS}
        widths = [layer.accumulator_bits for layer in self.layers if layer.accumulator_bits is not None]
        return sums | ({"accumulator_bits": max(widths)} if widths else {})

    def to_dict(self) -> dict[str, Any]:
        """Return layers, total and what is not counted, as plain values."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"layers": layers, "total": self.total(), "uncounted": list(self.uncounted)}

    def __str__(self) -> str:
        lines = [
            ["layer", "MACs", "effective", "bits", "BOPs", "effective", "sum bits", "weights B", "features B", "nJ"]
        ]
        for layer in self.layers:
            bits = f"{layer.feature_bits}x{layer.weight_bits}"
            lines.append([layer.name or "the network", *_cells(layer.to_dict(), bits)])
        lines.append(["sum", *_cells(self.total(), "")])
        width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
        text = [f"{name:<{width}}  " + "  ".join(map(str.rjust, cells, widths)) for name, *cells in lines]
        return "\n".join([*text, *(f"not counted: {name}" for name in self.uncounted)])


def cost(network: nn.Module, example: Any) -> Cost:
    """Count what one pass of `example` costs in a network's present state, prepared or converted.

    Args:
        network: Any module.
        example: One input, as in `compress`; its size and number of samples count.

    Returns:
        The cost, by layer and in sum.
    """
    recorder = _Recorder(network)
    # Attention as matrix products and a softmax, which one function would hide.
    with torch.no_grad(), parametrize.cached(), sdpa_kernel(SDPBackend.MATH):
        constants = {_storage(tensor): _Constant(tensor, {}) for tensor in network.buffers()}
        for weight in weights_of(network):
            value = getattr(weight.module, weight.tensor) if weight.facts else weight.parameter
            constants[_storage(value)] = _Constant(value.detach(), weight.facts, learned=True)
        recorder.run(example)
    with torch.enable_grad():
        return _Repetition(recorder, constants).cost()


@dataclass
class _Constant:
    """A weight or a buffer as the network uses it, with the facts of its operators."""

    value: Tensor
    facts: dict[str, Any]
    learned: bool = False

    def integers(self, used: Tensor, output: int) -> Tensor:
        """Return the magnitudes of the part `used` in steps of the grid, float64, to be added up over all inputs.

        Products that are added share a step: the finest, unless d runs along the dimension `output`.
        """
        decimal, axis = torch.tensor(self.facts["decimal"], device=used.device), self.facts["axis"]
        steps = 2.0 ** (shaped_along(decimal, self.value, axis) if axis == output else decimal.max()).double()
        whole = (self.value.double().abs() * steps).round()
        return whole.as_strided(used.shape, used.stride(), used.storage_offset() - self.value.storage_offset())


@dataclass
class _Call:
    """A function call on tensors: what it was given and returned, in which module, and the bits of features.

    masks: of the active operators of a feature, whose call has no function. whole: the tensor of which a part was
    written to.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    path: str
    bits: dict[int, int]
    fused: bool = False
    masks: list[Tensor] = field(default_factory=list)
    whole: Tensor | None = None

    @property
    def name(self) -> str:
        """The function by torch's name, whether in place or not."""
        name: str = self.function.overloadpacket.__name__
        return name.removesuffix("_")


class _Recorder(Trace):
    """A trace that keeps all calls.

    Attributes:
        tape: The calls, in order.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.tape: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_in((args, kwargs))
        bits = {id(t): self.values[t].bits for t in given if t in self.values}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not (self.muted or reads_sizes_alone(func)):
            made = [self.values[t] for t in tensors_in(out) if t in self.values]
            whole = self.bases.get(out) if given and out is given[0] else None
            path, fused = self.path[-1] if self.path else "", bool(made) and made[0].fused
            self.tape.append(_Call(func, args, kwargs or {}, out, path, bits, fused, whole=whole))
        return out

    def _operate(self, operators: list[Any], before: Tensor, after: Tensor) -> None:
        super()._operate(operators, before, after)
        masks = [operator.fitted(before) for operator in operators if isinstance(operator, Pruner)]
        self.tape.append(_Call(None, (before,), {}, after, "", {}, masks=masks))


class _Kept(torch.autograd.Function):
    """1 where x is above 0 or where `alive` says so, else 0; its gradient passes everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alive: Tensor | None) -> Tensor:
        kept = x > 0 if alive is None else (x > 0) | alive
        return kept.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass
class _Product:
    """The products of one call; `counts`: those with kept factors by element of the output."""

    layer: LayerCost
    counts: Tensor
    output: Tensor
    written_bits: int = 0

    def where(self, read: Tensor) -> LayerCost:
        """Return the cost, with the part of the output that is read."""
        effective = int((self.counts * read).sum(dtype=torch.int64))
        written = int(read.sum()) * (self.written_bits or FLOAT_BITS) / 8
        return replace(self.layer, effective_macs=effective, feature_bytes=self.layer.feature_bytes + written)


class _Repetition:
    """Repeats what was recorded on tensors of 0 and 1, by id of the tensors that they stand for."""

    def __init__(self, recorder: _Recorder, constants: dict[int, _Constant]) -> None:
        self.recorder, self.constants = recorder, constants
        self.kept: dict[int, Tensor] = {}
        self.made_by: dict[int, frozenset[int]] = {}  # products whose outputs are in a tensor, by their place
        self.products: list[_Product] = []
        self.read: list[Tensor] = []
        self.uncounted: dict[str, None] = {}

    def cost(self) -> Cost:
        """Return the cost of everything that was recorded."""
        for call in self.recorder.tape:
            (self._operate if call.function is None else self._repeat)(call)
        for tensor in tensors_in(self.recorder.output):
            if tensor in self.recorder.values:
                self._read(tensor, self.recorder.values[tensor].bits)
        outputs = [product.output for product in self.products]
        gradients: Iterable[Tensor | None] = [None] * len(outputs)
        if outputs and any(each.requires_grad for each in self.read):
            total = torch.stack(self.read).sum()
            gradients = torch.autograd.grad(total, outputs, allow_unused=True)
        layers: dict[tuple[Any, ...], LayerCost] = {}
        for product, gradient in zip(self.products, gradients, strict=True):
            layer = product.layer if gradient is None else product.where(gradient > 0)
            key = (layer.name, layer.operation, layer.feature_bits, layer.weight_bits)
            layers[key] = _added(layers[key], layer) if key in layers else layer
        return Cost(tuple(layers.values()), tuple(self.uncounted))

    def _operate(self, call: _Call) -> None:
        kept = self._of(call.args[0])
        for mask in call.masks:
            kept = kept * mask.float().cpu()
        self._set(call.out, kept, call.args)

    def _repeat(self, call: _Call) -> None:
        name, features = call.name, [t for t in tensors_in((call.args, call.kwargs)) if id(t) in call.bits]
        outs = tensors_in(call.out)
        if call.whole is not None:  # of a tensor that is written in parts, all counts as kept and read
            for tensor in features:
                self._read(tensor, call.bits[id(tensor)])
            self._forget([call.whole, *outs])
        elif name in _PRODUCTS:
            self._multiply(call)
        elif name in _SAME and features:
            self._set(outs[0], self._of(features[0]), features)
        elif features and (call.function.is_view or name.startswith(_LINEAR)):
            for out, kept in zip(outs, tree_leaves(self._linear(call)), strict=True):
                self._set(out, _Kept.apply(kept.float(), None), features)
        elif features and name in _MAX_POOLS and not _is_dilated(call):
            self._set(outs[0], _Kept.apply(_window_sums(call, self._of(features[0])), None), features)
        elif features and call.fused:
            self._set(outs[0], self._elementwise(call, features, outs[0]), features)
        else:
            if not call.fused and any(word in name for word in _HIDDEN_PRODUCTS):
                self.uncounted[f"{name} in {call.path or 'the network'}"] = None
            for tensor in features:
                self._read(tensor, call.bits[id(tensor)])
            self._forget(outs)

    def _forget(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self.kept.pop(id(tensor), None)
            self.made_by.pop(id(tensor), None)

    def _of(self, tensor: Tensor) -> Tensor:
        """Return which elements of a tensor are kept: all of one that nothing is known of."""
        if id(tensor) not in self.kept:
            self.kept[id(tensor)] = torch.ones(()).expand(tensor.shape)
        return self.kept[id(tensor)]

    def _set(self, tensor: Tensor, kept: Tensor, sources: Iterable[Tensor]) -> None:
        made_by = [self.made_by.get(id(source), frozenset()) for source in sources]
        self.kept[id(tensor)], self.made_by[id(tensor)] = kept, frozenset[int]().union(*made_by)

    def _read(self, tensor: Tensor, bits: int) -> None:
        self.read.append(self._of(tensor).sum())
        for place in self.made_by.get(id(tensor), ()):
            self.products[place].written_bits = self.products[place].written_bits or bits

    def _linear(self, call: _Call) -> Any:
        """Repeat a function that moves or adds elements."""
        floats = any(id(t) in call.bits and t.is_floating_point() for t in tensors_in(call.args))

        def kept(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point() or (id(value) in call.bits and not floats):
                return self._of(value) if id(value) in call.bits else torch.ones(value.shape)
            return value.cpu()  # an index

        args, kwargs = tree_map(kept, (call.args, call.kwargs))
        if call.name in ("view", "_unsafe_view"):
            return args[0].reshape(call.out.shape)
        if call.name.startswith("constant_pad") and len(args) > 2:
            args = (*args[:2], float(args[2] != 0))
        return call.function(*args, **kwargs)

    def _elementwise(self, call: _Call, features: list[Tensor], out: Tensor) -> Tensor:
        """Return what an elementwise function keeps: what it makes of zeros, it makes of what is masked."""
        args, kwargs = tree_map(lambda v: torch.zeros_like(v) if id(v) in call.bits else v, (call.args, call.kwargs))
        alive = (tree_leaves(call.function(*args, **kwargs))[0] != 0).cpu()
        parts = [self._of(tensor) for tensor in features]
        if call.name != "mul":
            total = sum(parts[1:], parts[0]).expand(out.shape)
            revived = bool(alive.any())
            return _Kept.apply(total, alive if revived else None) if revived or parts[1:] else total
        for factor in tensors_in((call.args, call.kwargs)):
            constant = self.constants.get(_storage(factor))
            if constant is not None and not constant.learned:  # a mask of the network's own
                parts.append((factor != 0).float().cpu())
        return math.prod(parts[1:], start=parts[0]).expand(out.shape)

    def _multiply(self, call: _Call) -> None:
        """Count the products of a call with kept factors."""
        factors = [call.args[place] for place in _PRODUCTS[call.name]]
        convolution = call.name == "convolution"
        transposed = convolution and call.args[6]
        features = [tensor for tensor in tensors_in(call.args) if id(tensor) in call.bits]
        for tensor in features:
            self._read(tensor, call.bits[id(tensor)])
        # What is computed from weights alone is a weight too, but where neither factor is a feature that was followed.
        others = {_storage(t): _Constant(t, {}) for t in factors if features} | self.constants
        constants = [None if id(t) in call.bits else others.get(_storage(t)) for t in factors]
        bits = [
            call.bits.get(id(tensor), FLOAT_BITS) if constant is None else constant.facts.get("bits", FLOAT_BITS)
            for tensor, constant in zip(factors, constants, strict=True)
        ]
        kept, moved = [], {"weight_bytes": 0.0, "feature_bytes": 0.0}
        for tensor, constant, width in zip(factors, constants, bits, strict=True):
            kept.append(self._of(tensor).detach() if constant is None else (tensor != 0).float().cpu())
            size = float(kept[-1].sum(dtype=torch.float64)) * width / 8
            moved["feature_bytes" if constant is None else "weight_bytes"] += size
        first, second = factors
        macs = (first if transposed else call.out).numel() * second[0].numel() if convolution else 0
        macs = macs or first.numel() * second.shape[-1]
        # Of two factors, the weight is the constant one; of two features, the second.
        feature_bits, weight_bits = bits[::-1] if constants[0] is not None and constants[1] is None else bits
        accumulator = _accumulator_bits(call, factors, constants, bits) if max(bits) < FLOAT_BITS else None
        layer = LayerCost(call.path, call.name, macs, 0, feature_bits, weight_bits, accumulator, **moved)
        output = torch.ones(()).expand(call.out.shape).requires_grad_()
        self.products.append(_Product(layer, _product(call, *kept).round().int(), output))
        self._set(call.out, output, ())
        self.made_by[id(call.out)] = frozenset((len(self.products) - 1,))


def _is_dilated(call: _Call) -> bool:
    """Return whether a pooling leaves elements of its windows out."""
    return len(call.args) > 4 and set(call.args[4]) != {1}


def _window_sums(call: _Call, kept: Tensor) -> Tensor:
    """Return how many kept elements lie in each window of a max pooling."""
    given, defaults = list(call.args[1:]), [None, 0, 1, False]
    size, stride, padding, _, ceil_mode = given + defaults[len(given) - 1 :]
    sums: Tensor = _MAX_POOLS[call.name](kept, size, stride or None, padding, ceil_mode, divisor_override=1)
    return sums


def _product(call: _Call, first: Tensor, second: Tensor) -> Tensor:
    """Repeat a product with other factors, and without what it adds to them."""
    if call.name == "convolution":
        result: Tensor = call.function(first, second, None, *call.args[3:])
        return result
    return torch.matmul(first, second)


def _accumulator_bits(call: _Call, factors: list[Tensor], constants: list[_Constant | None], bits: list[int]) -> int:
    """Return the bits of the largest sum of products: of features of the largest magnitude, all of one sign."""
    output = int(call.name == "convolution" and call.args[6])  # the dimension of a weight's outputs
    largest = []
    for place, (tensor, constant, width) in enumerate(zip(factors, constants, bits, strict=True)):
        if constant is not None:
            largest.append(constant.integers(tensor, output).cpu())
            continue
        shape = list(tensor.shape)
        if call.name == "convolution":  # one window of a sample is as good as all
            kernel, (stride, _, dilation) = factors[1].shape[2:], call.args[3:6]
            reach = [step + gap * (size - 1) + 1 for step, gap, size in zip(stride, dilation, kernel, strict=True)]
            shape = [1, shape[1], *map(min, shape[2:], reach)]
        else:
            shape[-1 if place else -2] = 1
        largest.append(torch.full(shape, 2.0 ** (width - 1), dtype=torch.float64))
    return int(_product(call, *largest).max()).bit_length() + 1


def _added(one: LayerCost, other: LayerCost) -> LayerCost:
    """Add up two calls of a layer."""
    names = ("macs", "effective_macs", "weight_bytes", "feature_bytes")
    sums = {name: getattr(one, name) + getattr(other, name) for name in names}
    if one.accumulator_bits is not None and other.accumulator_bits is not None:
        sums["accumulator_bits"] = max(one.accumulator_bits, other.accumulator_bits)
    return replace(one, **sums)


def _storage(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, which its views share."""
    return tensor.untyped_storage().data_ptr()


def _cells(values: dict[str, Any], bits: str) -> list[str]:
    """Write a line of the table."""
    macs = [f"{values[name]:,}" for name in ("macs", "effective_macs")]
    bops = [f"{values[name]:.4g}" for name in ("bops", "effective_bops")]
    moved = [f"{values[name]:,.0f}" for name in ("weight_bytes", "feature_bytes")]
    return [*macs, bits, *bops, str(values.get("accumulator_bits") or "-"), *moved, f"{values['energy_pj'] / 1e3:.4g}"]
