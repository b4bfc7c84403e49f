// A device "cuda" for a torch without CUDA. Its memory is the host's, ops run their CPU kernels, and what a GPU refuses
// is refused: tensors of two devices in one op, the host reading or writing the device during a capture. An access
// beyond an allocation ends the process, for unreadable memory follows each one.
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/extension.h>
#include <unistd.h>

#include <set>

#include "queue.h"

namespace simulated {

Graph* capture = nullptr;

namespace {

using at::Tensor;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;

const c10::Device kDevice(DeviceType::CUDA, 0);
const DispatchKeySet kKeys(DispatchKey::CUDA);

void refuse_in_capture(const std::string& what) {
  TORCH_CHECK(capture == nullptr, "operation not permitted when stream is capturing: ", what);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---- Memory ---------------------------------------------------------------------------------------------------------

struct Block {
  void* start;
  size_t size;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  if (capture == nullptr) munmap(block->start, block->size);  // a graph goes on using what was allocated for it
  delete block;
}

struct Allocator final : c10::Allocator {
  // Ends where a page that cannot be touched begins; filled with NaN.
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, kDevice};
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), used = (bytes + 15) / 16 * 16;
    const size_t whole = (used + page - 1) / page * page;
    void* start = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(start != MAP_FAILED, "simulated GPU: out of memory for ", bytes, " bytes");
    char* end = static_cast<char*>(start) + whole;
    mprotect(end, page, PROT_NONE);
    memset(end - used, 0xFF, used);
    return {end - used, new Block{start, whole + page}, &release, kDevice};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} allocator;

Tensor with_storage(c10::DataPtr data, size_t bytes, c10::Allocator* from, DispatchKey key, const Tensor& like) {
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, std::move(data),
                                                       from, /*resizable=*/true);
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

// A CPU tensor over the memory of one of the device.
Tensor host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  c10::DataPtr data(tensor.storage().mutable_data(), c10::Device(at::kCPU));
  return with_storage(std::move(data), tensor.storage().nbytes(), c10::GetCPUAllocator(), DispatchKey::CPU, tensor);
}

// A tensor of the device that takes over the memory of a CPU tensor.
Tensor device(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cpu()) return tensor;
  c10::DataPtr data(tensor.storage().mutable_data(), new Tensor(tensor),
                    [](void* kept) { delete static_cast<Tensor*>(kept); }, kDevice);
  return with_storage(std::move(data), tensor.storage().nbytes(), &allocator, DispatchKey::CUDA, tensor);
}

// ---- Ops that make, view or move memory -------------------------------------------------------------------------------

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

Tensor view_of(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, int64_t offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(self.storage()),
                                                       self.key_set(), self.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return view;
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return view_of(self, size, stride, offset.value_or(self.storage_offset()));
}

Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return view_of(self, size, stride, self.storage_offset());
}

Tensor view(const Tensor& self, at::IntArrayRef size) {
  auto wanted = at::infer_size_dv(size, self.numel());
  auto stride = at::detail::computeStride(self.sizes(), self.strides(), wanted);
  TORCH_CHECK(stride.has_value(), "view: sizes ", size, " do not fit strides ", self.strides());
  return view_of(self, wanted, *stride, self.storage_offset());
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    auto data = allocator.allocate(bytes);
    memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage_place(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                          at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const int64_t count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage_place(self, std::move(source), 0, {count}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_place(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_empty(Tensor& self) { return set_tensor(self, at::empty({0}, self.options())); }

const Tensor& moved(const Tensor& to, const Tensor& from) {
  if (to.numel() == 0) return to;
  if (from.is_cuda() && !to.is_cuda()) refuse_in_capture("a copy to the host");
  if (to.is_cuda() && !from.is_cuda()) refuse_in_capture("a copy from the host");
  enqueue([to = host(to), from = host(from), kept = std::pair(to, from)] { to.copy_(from); });
  return to;
}

Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  moved(self, from);
  return self;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) { return moved(to, from); }

at::Scalar local_scalar_dense(const Tensor& tensor) {
  refuse_in_capture("reading a number");
  return at::_local_scalar_dense(host(tensor));
}

// ---- All others: the op's CPU kernel on the same memory -----------------------------------------------------------------

const std::set<std::string> kReading = {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"};
const std::set<std::string> kHostIndices = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

// Tensors of the device among an op's arguments, and what stands for them on the CPU.
struct Taken {
  const std::string& op;
  std::vector<std::pair<Tensor, Tensor>> pairs;
  std::vector<c10::IntArrayRef> strays;

  Tensor take(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.dim() != 0 && !kHostIndices.count(op)) strays.push_back(tensor.sizes());
      return tensor;
    }
    return pairs.emplace_back(tensor, host(tensor)).second;
  }

  void take(c10::IValue& value) {
    if (value.isTensor()) {
      value = take(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (Tensor& one : list) one = take(one);
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& one : value.toOptionalTensorList()) {
        list.push_back(one ? std::optional<Tensor>(take(*one)) : std::nullopt);
      }
      value = std::move(list);
    } else if (value.isDevice()) {
      value = c10::Device(at::kCPU);
    }
  }

  Tensor give(const Tensor& tensor) const {
    for (const auto& [original, alias] : pairs) {
      if (tensor.defined() && tensor.is_same(alias)) return original;
    }
    for (const auto& [original, alias] : pairs) {
      if (tensor.defined() && tensor.storage().is_alias_of(alias.storage())) {
        return view_of(original, tensor.sizes(), tensor.strides(), tensor.storage_offset());
      }
    }
    return device(tensor);
  }

  void give(c10::IValue& value) const {
    if (value.isTensor()) {
      value = give(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (Tensor& one : list) one = give(one);
      value = std::move(list);
    }
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
}

// Runs the op, for the shapes of its results, undoes what it wrote, and enqueues it for the replays.
void record(const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t first, const Taken& taken) {
  torch::jit::Stack arguments(stack->begin() + first, stack->end());
  std::vector<Tensor> before;
  for (const auto& pair : taken.pairs) before.push_back(pair.second.clone());
  run_on_host(op, stack);
  for (size_t i = 0; i < before.size(); ++i) taken.pairs[i].second.copy_(before[i]);
  torch::jit::Stack results(stack->end() - op.schema().returns().size(), stack->end());
  enqueue([op, arguments, results, kept = taken.pairs] {
    auto again = arguments;
    run_on_host(op, &again);
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].isTensor() && !results[i].isSameIdentity(again[i])) {
        results[i].toTensor().copy_(again[i].toTensor());
      }
    }
  });
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t first = stack->size() - schema.arguments().size();
  if (kReading.count(schema.name())) refuse_in_capture(schema.name());
  Taken taken{schema.name(), {}, {}};
  for (size_t i = first; i < stack->size(); ++i) taken.take((*stack)[i]);
  TORCH_CHECK(taken.strays.empty() || taken.pairs.empty(), "Expected all tensors to be on the same device, but ",
              schema.name(), " got some of the device and a CPU tensor of sizes ", taken.strays.front());
  if (capture == nullptr) {
    run_on_host(op, stack);
  } else {
    record(op, stack, first, taken);
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) taken.give((*stack)[i]);
  for (const auto& [original, alias] : taken.pairs) {  // results that the op has resized
    if (alias.sizes() != original.sizes()) set_tensor(const_cast<Tensor&>(original), device(alias));
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("resize_", &resize_);
  m.impl("set_", &set_empty);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_place);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &local_scalar_dense);
}

}  // namespace
}  // namespace simulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace simulated;
  c10::SetAllocator(DeviceType::CUDA, &allocator);
  py::class_<Graph>(m, "Graph")
      .def(py::init())
      .def("capture_begin", [](Graph& graph, py::args, py::kwargs) { capture = &graph; })
      .def("capture_end", [](Graph&) { capture = nullptr; })
      .def("replay", [](Graph& graph) {
        for (auto& work : graph.work) work();
      });
}
