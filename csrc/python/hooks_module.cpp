// The second library: what of the hooks Python must see as a Python object. It has no code of its
// own; everything here is in the operator library, which it links.

#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm/hooks/attach.h"
#include "comm/hooks/hooked_backend.h"
#include "comm/hooks/order_guard.h"
#include "comm/label.h"

namespace {

namespace py = pybind11;
namespace comm = torch_moe_ep::comm;

using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;

py::object class_of_wrapped(const comm::HookedBackend& self) {
  return py::type::of(py::cast(self.inner()));
}

py::object attribute_of_wrapped(const comm::HookedBackend& self, const std::string& name) {
  return py::cast(self.inner()).attr(name.c_str());
}

// What it does not know itself it asks the wrapped backend: ProcessGroupNCCL has functions of its
// own that torch.distributed calls. isinstance() looks at `__class__` too, and torch.distributed
// finds out by isinstance() whether a backend is gloo's or NCCL's.
void bind_backend(py::module& m) {
  auto bound =
      py::class_<comm::HookedBackend, c10d::Backend, c10::intrusive_ptr<comm::HookedBackend>>(
          m, "HookedBackend")
          .def_property_readonly("wrapped", &comm::HookedBackend::inner)
          .def("__getattr__", &attribute_of_wrapped);
  // By setattr it would be the class's own class.
  const py::object property = py::reinterpret_borrow<py::object>(
      reinterpret_cast<PyObject*>(&PyProperty_Type))(py::cpp_function(&class_of_wrapped));
  auto* type = reinterpret_cast<PyTypeObject*>(bound.ptr());
  if (PyDict_SetItemString(type->tp_dict, "__class__", property.ptr()) != 0) {
    throw py::error_already_set();
  }
  PyType_Modified(type);
}

py::tuple as_tuple(const comm::StageCount& count) {
  return py::make_tuple(
      count.group, count.stage, count.calls, count.bytes, count.milliseconds, count.timed);
}

void bind_groups(py::module& m) {
  m.def("attach", &comm::attach_hooks, py::arg("group"), py::arg("global_ranks"));
  m.def("detach", &comm::detach_hooks, py::call_guard<py::gil_scoped_release>());
  m.def("has_hooks", &comm::has_hooks);
  m.def("stage_counts", [](const std::optional<GroupPtr>& group) {
    py::list rows;
    for (const auto& count : comm::stage_counts(group.value_or(GroupPtr()))) {
      rows.append(as_tuple(count));
    }
    return rows;
  });
  m.def("reset_stage_counts", &comm::reset_stage_counts);
  m.def("read_times", &comm::read_times);
  m.def("set_timed", [](bool is_timed) { comm::hook_settings().is_timed = is_timed; });
  m.def("set_checked", [](bool is_checked) { comm::hook_settings().is_checked = is_checked; });
}

void bind_labels(py::module& m) {
  m.def("intern_layer", &comm::intern_layer);
  // A stage is handed to Python by its address, which stays.
  m.def("exchange_label", [](int32_t layer, uintptr_t stage) {
    // NOLINTNEXTLINE(performance-no-int-to-ptr): what intern_stage or this function gave out
    const auto before = comm::exchange_label({layer, reinterpret_cast<const char*>(stage)});
    return std::pair(before.layer, reinterpret_cast<uintptr_t>(before.stage));
  });
  m.def("current_layer", [] { return comm::current_label().layer; });
  m.def("intern_stage", [](const std::string& stage) {
    return reinterpret_cast<uintptr_t>(comm::intern_stage(stage));
  });
}

void bind_order_guard(py::module& m) {
  m.def(
      "start_order_guard",
      [](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size) {
        comm::OrderGuard::get().start(store, rank, size);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "stop_order_guard",
      [] { comm::OrderGuard::get().stop(); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "begin_forward",
      [](const std::string& kind, bool is_inside_backward) {
        comm::OrderGuard::get().begin_forward(kind, is_inside_backward);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "end_forward",
      [] { comm::OrderGuard::get().end_forward(); },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::module::import("torch.distributed");  // registers the base classes
  bind_backend(m);
  bind_groups(m);
  bind_labels(m);
  bind_order_guard(m);
}
