/* The operators as nodes of torch's autograd engine: what straight_through.py computes with kernels.c, the same bits,
 * without a line of Python between two layers, which in a step of a few milliseconds is most of what they cost.
 *
 * Built by node_builder.py against the headers of the torch that is installed, on its public C++ interface for
 * functions with a gradient. The passes over memory stay those of kernels.c: `use` is given their addresses, so nothing
 * here depends on the CPU. Where they do not fit, `operate` answers None, and the function in Python decides what to do.
 */
#include <Python.h>

#include <cstring>
#include <optional>
#include <utility>

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

/* The functions of kernels.c, in the order in which `use` is given them. */
struct {
    void (*quantize)(const float *x, const float *mask, float *out, int64_t rows, int64_t width,
                     const int32_t *decimals, int64_t channels, int64_t inner, float low, float high, int32_t rounding,
                     int32_t rectify);
    void (*clip_gradient)(const float *grad, const float *mask, float *out, int64_t rows, int64_t width,
                          const int32_t *decimals, int64_t channels, int64_t inner, float low, float high);
    void (*clip_rectified)(const float *grad, const float *result, const float *mask, float *out, int64_t rows,
                           int64_t width, const int32_t *decimal, float low, float high);
    int32_t (*changes_gradient)(const float *grad, const float *mask, int64_t rows, int64_t width,
                                const int32_t *decimal, float low, float high);
    void (*multiply)(const float *x, const float *mask, float *out, int64_t rows, int64_t width);
    void (*clip_before_tanh)(const float *grad, const float *result, const float *mask, float *out, int64_t rows,
                             int64_t width, const int32_t *decimal, float low, float high, int32_t contracted);
} kernels;

/* How torch computes the gradient of a tanh on this machine, as `clip_before_tanh` is told it; negative: otherwise. */
int32_t tanh_contracted = -1;

/* The operators of one call: a mask, decimal bits with the grid's bounds and rounding, or both. */
struct Call : torch::CustomClassHolder {
    Tensor mask, decimal;
    Tensor tanh; /* until it is saved for the backward pass */
    int64_t axis = -1;
    float low = 0, high = 0;
    int32_t rounding = 0;
    bool in_place = false, rectify = false, behind_tanh = false;

    const float *at_mask() const { return mask.defined() ? mask.const_data_ptr<float>() : nullptr; }
    const int32_t *decimals() const { return decimal.const_data_ptr<int32_t>(); }
};

/* As in kernels.c. */
struct Shape {
    int64_t rows, width, channels, inner;
};

bool is_usable(const Tensor &x) {
    return !at::isTensorSubclassLike(x) && x.is_cpu() && x.scalar_type() == at::kFloat &&
           (x.is_contiguous() || (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)));
}

/* What the kernels must know of x, or nothing where they do not fit. */
std::optional<Shape> shape_for(const Tensor &x, const Call &call) {
    if (!is_usable(x))
        return {};
    Shape shape{1, x.numel(), 1, 1};
    const Tensor &mask = call.mask, &decimal = call.decimal;
    if (mask.defined()) {
        if (mask.scalar_type() != at::kFloat || !mask.is_cpu() || mask.requires_grad())
            return {};
        const bool of_sample = mask.dim() == x.dim() - 1;
        if (mask.sizes() != x.sizes().slice(of_sample) || mask.strides() != x.strides().slice(of_sample))
            return {};
        if (of_sample) {
            shape.width = mask.numel();
            shape.rows = x.size(0);
            if (shape.rows > 1 && x.stride(0) != shape.width)
                return {};
        }
    }
    if (!decimal.defined())
        return shape;
    if (!decimal.is_cpu() || decimal.scalar_type() != at::kInt)
        return {};
    if (decimal.numel() != 1) {
        const int64_t axis = call.axis;
        if (shape.rows > 1 || call.rectify || call.behind_tanh || decimal.dim() != 1 || !decimal.is_contiguous() ||
            axis < 0 || axis >= x.dim() || x.size(axis) != decimal.numel())
            return {};
        shape.channels = decimal.numel();
        shape.inner = x.stride(axis);
    }
    return shape;
}

/* The gradient by functions of torch: for gradients of other layouts, and where it has a gradient itself. */
Tensor by_torch(const Call &call, Tensor grad, const Tensor &result) {
    if (call.rectify)
        grad = at::threshold_backward(grad, result, 0);
    if (call.decimal.defined()) {
        Tensor step = call.decimal.neg().add(127).bitwise_left_shift(23).view(at::kFloat); /* 2^-d by its bits */
        if (step.numel() > 1) {
            std::vector<int64_t> along(grad.dim(), 1);
            along[call.axis] = -1;
            step = step.view(along);
        }
        grad = at::clamp(grad, step.mul(call.low), step.mul(call.high));
    }
    if (call.mask.defined())
        grad = grad.mul(call.mask);
    return call.behind_tanh ? at::tanh_backward(grad, result) : grad;
}

/* Whether nobody else holds this gradient, as torch itself asks before it adds to one in place. */
bool is_ours(const Tensor &grad) { return grad.use_count() == 1 && grad.storage().use_count() == 1; }

Tensor by_kernels(const Call &call, const Shape &of, const Tensor &grad, const Tensor &result) {
    const float *in = grad.const_data_ptr<float>();
    const bool quantizes = call.decimal.defined();
    if (quantizes && !result.defined() && of.channels == 1 &&
        !kernels.changes_gradient(in, call.at_mask(), of.rows, of.width, call.decimals(), call.low, call.high))
        return grad;
    Tensor out = is_ours(grad) ? grad : at::empty_like(grad);
    float *to = out.mutable_data_ptr<float>();
    if (!quantizes)
        kernels.multiply(in, call.at_mask(), to, of.rows, of.width);
    else if (call.behind_tanh)
        kernels.clip_before_tanh(in, result.const_data_ptr<float>(), call.at_mask(), to, of.rows, of.width,
                                 call.decimals(), call.low, call.high, tanh_contracted);
    else if (call.rectify)
        kernels.clip_rectified(in, result.const_data_ptr<float>(), call.at_mask(), to, of.rows, of.width,
                               call.decimals(), call.low, call.high);
    else
        kernels.clip_gradient(in, call.at_mask(), to, of.rows, of.width, call.decimals(), of.channels, of.inner,
                              call.low, call.high);
    return out;
}

/* Eq. 3 and 1 forward; backward Eq. 2 as the authors coded it, then the mask. Behind a tanh, the gradient of that is
 * part of the same pass, and x has the place of the tanh's input in the graph. */
struct Operate : torch::autograd::Function<Operate> {
    static Tensor forward(AutogradContext *ctx, const Tensor &x, const c10::intrusive_ptr<Call> &call,
                          const Shape &of) {
        if (call->in_place)
            ctx->mark_dirty({x});
        ctx->saved_data["call"] = c10::IValue::make_capsule(call);
        Tensor out = call->in_place ? x : at::empty_like(x);
        const float *in = x.const_data_ptr<float>();
        float *to = out.mutable_data_ptr<float>();
        if (call->decimal.defined())
            kernels.quantize(in, call->at_mask(), to, of.rows, of.width, call->decimals(), of.channels, of.inner,
                             call->low, call->high, call->rounding, call->rectify);
        else
            kernels.multiply(in, call->at_mask(), to, of.rows, of.width);
        if (call->rectify || call->behind_tanh)
            ctx->save_for_backward({call->rectify ? out : std::exchange(call->tanh, Tensor())});
        return out;
    }

    static variable_list backward(AutogradContext *ctx, const variable_list &grads) {
        const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
        const Tensor &grad = grads[0];
        if (!grad.defined())
            return {Tensor(), Tensor(), Tensor()};
        const Tensor result = call->rectify || call->behind_tanh ? ctx->get_saved_variables()[0] : Tensor();
        if (!at::GradMode::is_enabled()) {
            const auto of = shape_for(grad, *call);
            if (of && (!result.defined() || (is_usable(result) && result.strides() == grad.strides())))
                return {by_kernels(*call, *of, grad, result), Tensor(), Tensor()};
        }
        return {by_torch(*call, grad, result), Tensor(), Tensor()};
    }
};

/* use(addresses of the functions in `kernels`, how torch computes the gradient of a tanh) */
PyObject *use(PyObject *, PyObject *const *given, Py_ssize_t count) {
    constexpr int functions = 6;
    void *addresses[functions];
    static_assert(sizeof addresses == sizeof kernels);
    if (count != functions + 1) {
        PyErr_SetString(PyExc_TypeError, "use takes six addresses and a number");
        return nullptr;
    }
    for (int i = 0; i < functions; i++)
        addresses[i] = PyLong_AsVoidPtr(given[i]);
    tanh_contracted = static_cast<int32_t>(PyLong_AsLong(given[functions]));
    if (PyErr_Occurred())
        return nullptr;
    std::memcpy(&kernels, addresses, sizeof kernels);
    Py_RETURN_NONE;
}

/* If x is the output of a tanh, the same values in the graph in place of its input; else, and if somebody waits for the
 * gradient of x itself, nothing. */
Tensor in_place_of_tanhs_input(const Tensor &x) {
    const auto maker = x.grad_fn();
    if (tanh_contracted < 0 || !maker || maker->name() != "TanhBackward0" || !maker->tensor_pre_hooks().empty() ||
        !maker->retains_grad_hooks().empty() || !maker->pre_hooks().empty() || !maker->post_hooks().empty())
        return {};
    const auto edge = maker->next_edge(0);
    if (!edge.is_valid() || edge.function->name() == "torch::autograd::AccumulateGrad")
        return {};
    Tensor values = x.detach();
    torch::autograd::impl::set_gradient_edge(values, edge);
    return values;
}

/* operate(x, mask or None, decimal or None, axis or None, low, high, rounding, in_place, rectify, sole_reader): the
 * result, or None where the kernels do not fit. */
PyObject *operate(PyObject *, PyObject *const *given, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    if (count != 10) {
        PyErr_SetString(PyExc_TypeError, "operate takes ten arguments");
        return nullptr;
    }
    if (!kernels.quantize || !THPVariable_CheckExact(given[0]))
        Py_RETURN_NONE;
    const Tensor &x = THPVariable_Unpack(given[0]);
    auto call = c10::make_intrusive<Call>();
    for (int i = 1; i < 3; i++) {
        if (given[i] == Py_None)
            continue;
        if (!THPVariable_Check(given[i]))
            Py_RETURN_NONE;
        (i == 1 ? call->mask : call->decimal) = THPVariable_Unpack(given[i]);
    }
    if (given[3] != Py_None)
        call->axis = PyLong_AsLongLong(given[3]);
    call->low = static_cast<float>(PyFloat_AsDouble(given[4]));
    call->high = static_cast<float>(PyFloat_AsDouble(given[5]));
    call->rounding = static_cast<int32_t>(PyLong_AsLong(given[6]));
    call->in_place = given[7] == Py_True;
    call->rectify = given[8] == Py_True;
    const bool sole_reader = given[9] == Py_True;
    if (PyErr_Occurred())
        return nullptr;
    const bool has_no_place = call->in_place && ((x.is_leaf() && x.requires_grad()) || x.is_view());
    const auto of = shape_for(x, *call);
    if (!of || has_no_place) /* what torch says of such places, it says of the function in Python */
        Py_RETURN_NONE;
    if (sole_reader && call->decimal.defined() && of->channels == 1 && !call->in_place && !call->rectify &&
        at::GradMode::is_enabled()) {
        const Tensor before = in_place_of_tanhs_input(x);
        if (before.defined()) {
            call->behind_tanh = true;
            call->tanh = x; /* with its own place in the graph, for the gradient of the gradient */
            return THPVariable_Wrap(Operate::apply(before, call, *of));
        }
    }
    return THPVariable_Wrap(Operate::apply(x, call, *of));
    END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"use", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(use)), METH_FASTCALL, nullptr},
    {"operate", reinterpret_cast<PyCFunction>(reinterpret_cast<void *>(operate)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "qprune_nodes", nullptr, -1, functions};

} // namespace

PyMODINIT_FUNC PyInit_qprune_nodes() { return PyModule_Create(&module); }
