// The binding: Python objects in, rows of pointers out. No arithmetic here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "stream.h"
#include "table.h"

namespace nb = nanobind;

namespace ebbtide {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> list = {&kernels_baseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    list.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      list.push_back(&kernels_avx512);
    }
  }
#endif
  return list;
}

const Kernels*& chosen() {
  static const Kernels* kernels = supported().back();
  return kernels;
}

void choose(const std::string& name) {
  for (const Kernels* kernels : supported()) {
    if (name == kernels->name) {
      chosen() = kernels;
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not supported by this machine");
}

// (address, scale address, format)
Field field(const nb::tuple& t) {
  return {reinterpret_cast<void*>(nb::cast<uintptr_t>(t[0])),
          reinterpret_cast<void*>(nb::cast<uintptr_t>(t[1])),
          Format(nb::cast<int32_t>(nb::int_(t[2])))};
}

// Guards against two threads stepping one optimizer while the GIL is released.
struct Busy {
  explicit Busy(bool& flag) : flag(flag) {
    if (flag) throw std::runtime_error("this optimizer is already stepping in another thread");
    flag = true;
  }
  ~Busy() { flag = false; }
  bool& flag;
};

// Holds the cyclic collector off while a step holds the gradients' wrappers: thousands of
// objects that live for a moment would set it off in every step (half of a step of 2,000 small
// tensors).
struct NoCollection {
  NoCollection() : was_on(PyGC_Disable()) {}
  ~NoCollection() {
    if (was_on) PyGC_Enable();
  }
  int was_on;
};

struct BoundTable : Table {
  using Table::Table;
  bool busy = false;
};

// One row from a plan.Row; `param` and `state` are the objects to watch, `key` finds the state.
void add(BoundTable& table, nb::object param, int32_t group, nb::object row, nb::object state,
         nb::object key, bool elsewhere) {
  Entry e;
  std::vector<int64_t> extents;
  e.group = group;
  e.elsewhere = elsewhere;
  e.param = param.inc_ref().ptr();
  if (!row.is_none()) {
    Row& r = e.row;
    r.param = field(row.attr("param"));
    r.grad = field(row.attr("grad"));
    int k = 0;
    for (nb::handle f : row.attr("state")) r.state[k++] = field(nb::cast<nb::tuple>(f));
    r.residual = reinterpret_cast<void*>(nb::cast<uintptr_t>(row.attr("residual")));
    r.residual_bits = nb::cast<int32_t>(row.attr("residual_bits"));
    r.stochastic = nb::cast<bool>(row.attr("stochastic"));
    r.numel = nb::cast<int64_t>(row.attr("numel"));
    r.run_length = nb::cast<int64_t>(row.attr("run_length"));
    r.lead = nb::cast<int64_t>(row.attr("lead"));
    r.first_block = nb::cast<int64_t>(row.attr("first_block"));
    r.salt = nb::cast<uint64_t>(row.attr("salt"));
    if (!nb::cast<bool>(row.attr("counts_on_device")))
      e.step = reinterpret_cast<void*>(nb::cast<uintptr_t>(row.attr("step_address")));
    e.step_is_double = nb::cast<bool>(row.attr("step_is_double"));
    e.count = nb::cast<int64_t>(row.attr("count"));
    e.next = e.next_step();
    e.local = nb::cast<bool>(row.attr("local"));
    e.lazy_grad = nb::cast<bool>(row.attr("lazy_grad"));
    for (nb::handle extent : row.attr("extents")) extents.push_back(nb::cast<int64_t>(extent));
    table.take_device(e);
    e.active = e.reported = true;
    e.state = nb::cast<nb::dict>(state).inc_ref().ptr();
    e.key = key.inc_ref().ptr();
    e.hash = PyObject_Hash(e.key);
    if (e.hash == -1) throw nb::python_error();
  }
  Entry& added = table.add(e, extents);
  if (e.state == nullptr) return;
  for (auto [name, value] : nb::borrow<nb::dict>(e.state)) {
    table.watch(added, name.ptr(), value.ptr());
  }
}

// From plan.Bucket tuples: (group, scalars, ...).
std::vector<Bucket> read_buckets(const nb::list& list) {
  std::vector<Bucket> buckets;
  for (nb::handle each : list) {
    const nb::tuple bucket = nb::cast<nb::tuple>(each);
    Bucket& to = buckets.emplace_back(Bucket{nb::cast<int32_t>(bucket[0]), {}});
    const nb::object scalars = bucket[1];
    if (!read_numbers(scalars.ptr(), kScalarCount, reinterpret_cast<double*>(&to.scalars))) {
      throw nb::python_error();
    }
  }
  return buckets;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  int result = 0;
  const BoundTable& table = *nb::inst_ptr<BoundTable>(self);
  const auto each = [&](PyObject* object) {
    if (object != nullptr && result == 0) result = visit(object, arg);
  };
  table.each_object(each);
  table.groups.each_object(each);
  return result;
}

int clear(PyObject* self) {
  nb::inst_ptr<BoundTable>(self)->clear();
  return 0;
}

PyType_Slot table_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                             {Py_tp_clear, reinterpret_cast<void*>(clear)},
                             {0, nullptr}};

int64_t run(BoundTable& table, const nb::list& buckets, double grad_scale, bool guard) {
  const Busy busy(table.busy);
  if (!table.prepare(read_buckets(buckets))) return Table::kMissingBucket;
  nb::gil_scoped_release release;
  return table.run(grad_scale, guard);
}

// What a step is checked against: the groups, their parameters, gradients, all state.
bool refresh(BoundTable& table, nb::handle groups, nb::handle params, nb::handle grads,
             nb::handle states, nb::handle read) {
  const auto given = [](nb::handle list) { return list.is_none() ? nullptr : list.ptr(); };
  const bool fresh = table.groups.refresh(groups.ptr(), read.ptr()) &&
                     table.refresh(given(params), given(grads), states.ptr());
  if (PyErr_Occurred()) throw nb::python_error();
  return fresh;
}

// Added to the count that `step` returns where other parameters were stepped than before.
constexpr int64_t kOthersStepped = int64_t(1) << 62;

// Clips the global norm to max_norm, which may be infinite, where that is above zero; a norm that
// is not finite counts as stale: what becomes of such a step is the face's affair.
int64_t step(BoundTable& table, nb::handle groups, nb::handle params, nb::handle grads,
             nb::handle states, nb::handle read, double grad_scale, bool guard, double max_norm) {
  const NoCollection off;
  const Busy busy(table.busy);
  if (!refresh(table, groups, params, grads, states, read)) return Table::kStale;
  int64_t result = Table::kStale;
  if (table.prepare()) {
    nb::gil_scoped_release release;
    if (max_norm > 0) grad_scale *= table.clip(grad_scale, max_norm);
    if (std::isfinite(grad_scale)) result = table.run(grad_scale, guard);
  }
  table.release_grads();
  return result >= 0 && table.changed() ? result + kOthersStepped : result;
}

double sum_squares(BoundTable& table) {
  const Busy busy(table.busy);
  nb::gil_scoped_release release;
  return table.sum_squares();
}

// For a backend that has rows of its own: kStale, also where others have a gradient than before or
// a count was changed, or else whether a gradient has moved. `to` is the address of as many int64
// as there are rows.
int64_t gradients(BoundTable& table, nb::handle params, nb::handle states, uintptr_t to) {
  const NoCollection off;
  const Busy busy(table.busy);
  const bool fresh = table.refresh(params.ptr(), nullptr, states.ptr());
  if (PyErr_Occurred()) throw nb::python_error();
  if (!fresh) return Table::kStale;
  const bool holds = !table.changed() && table.counts_hold();
  const int64_t result =
      holds ? int64_t(table.grads(reinterpret_cast<int64_t*>(to))) : int64_t(Table::kStale);
  table.release_grads();
  return result;
}

// In which order `gradients` writes: the entry of each place.
void place(BoundTable& table, const std::vector<size_t>& order) {
  for (size_t k = 0; k < order.size(); ++k) table.entries.at(order[k]).place = int64_t(k);
}

std::vector<std::pair<int32_t, int64_t>> needed(const BoundTable& table) {
  std::vector<std::pair<int32_t, int64_t>> keys;
  for (const Entry& e : table.entries) {
    const std::pair<int32_t, int64_t> key{e.group, e.next_step()};
    if (e.active && std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);
  }
  return keys;
}

std::vector<std::pair<int64_t, int64_t>> untouched(const BoundTable& table) {
  std::vector<std::pair<int64_t, int64_t>> rows;
  for (size_t i = 0; i < table.entries.size(); ++i) {
    const Entry& e = table.entries[i];
    if (e.active && e.untouched > 0) rows.emplace_back(int64_t(i), e.untouched);
  }
  return rows;
}

}  // namespace

const Kernels& kernels() { return *chosen(); }

NB_MODULE(_core, m) {
  // At exit the interpreter may still hold optimizers; that is no leak of ours.
  nb::set_leak_warnings(false);
  m.doc() = "The compiled core of ebbtide; used through ebbtide.backends.cpu.";
  m.attr("SCALAR_COUNT") = kScalarCount;
  m.attr("OTHERS_STEPPED") = kOthersStepped;
  m.attr("STALE") = int64_t(Table::kStale);
  m.attr("MISSING_BUCKET") = int64_t(Table::kMissingBucket);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
    return names;
  });
  m.def("instruction_set", [] { return std::string(kernels().name); });
  m.def("set_instruction_set", &choose, nb::arg("name"));
  m.def("threads", [] { return Threads::instance().count(); });
  m.def("set_threads", [](int count) { Threads::instance().force(count); }, nb::arg("count"));
  m.def("thread_runtime", [] { return std::string(Threads::instance().runtime()); });
  m.def("memory_stream", &memory_stream, nb::arg("elements"), nb::arg("repeats"),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("cpu_quota", [] { return Threads::instance().quota(); });

  nb::class_<BoundTable>(m, "Table", nb::type_slots(table_slots))
      .def(
          "__init__",
          [](BoundTable* self, int32_t rule, nb::handle exchange_api) {
            DLPackExchangeAPI* api = nullptr;
            if (!exchange_api.is_none()) {
              api = static_cast<DLPackExchangeAPI*>(
                  PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
              if (api == nullptr) throw nb::python_error();
              if (api->version.major != 1) throw std::invalid_argument("unknown DLPack version");
            }
            new (self) BoundTable(Rule(rule), api);
          },
          nb::arg("rule"), nb::arg("exchange_api").none())
      .def("add", &add, nb::arg("param"), nb::arg("group"), nb::arg("row").none(),
           nb::arg("state").none(), nb::arg("key"), nb::arg("elsewhere") = false)
      .def("run", &run, nb::arg("buckets"), nb::arg("grad_scale"), nb::arg("guard"))
      .def("step", &step, nb::arg("groups"), nb::arg("params").none(), nb::arg("grads").none(),
           nb::arg("states"), nb::arg("read"), nb::arg("grad_scale"), nb::arg("guard"),
           nb::arg("max_norm"))
      .def("sum_squares", &sum_squares)
      .def_prop_ro("norm", [](const BoundTable& table) { return table.norm; })
      .def("gradients", &gradients, nb::arg("params"), nb::arg("states"), nb::arg("to"))
      .def("place", &place, nb::arg("order"))
      .def("advance", &Table::advance)
      .def("stepped",
           [](BoundTable& table) {
             PyObject* list = table.stepped();
             if (list == nullptr) throw nb::python_error();
             return nb::steal<nb::list>(list);
           })
      .def("needed", &needed)
      .def("untouched", &untouched);
}

}  // namespace ebbtide
