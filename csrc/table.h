// The table of one optimizer: a row a parameter, checked and refreshed in each step.
#pragma once
#include <Python.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "parallel.h"
#include "step.h"
#include "tensor.h"

namespace ebbtide {

const Kernels& kernels();  // chosen once, for this machine

// A row and what must still be true of it when the next step begins.
struct Entry {
  Row row;
  PyObject* param = nullptr;  // the object in param_groups
  PyObject* key = nullptr;    // under which the optimizer keeps its state
  Py_hash_t hash = 0;
  PyObject* state = nullptr;  // its state dict; null while the parameter has had no gradient
  std::vector<PyObject*> keys, values;  // the state as it was when its addresses were taken
  std::vector<void*> addresses;         // of the values; null where one is no tensor
  std::vector<PyObject*> held;          // their memory
  PyObject* grad = nullptr;             // held while a step runs
  Layout layout;
  void* step = nullptr;  // the step count: float32, or float64
  bool step_is_double = false;
  bool local = false;      // a DTensor: the row is its `_local_tensor`
  bool lazy_grad = false;  // its gradient may be a lazy conjugate or negative
  int64_t count = 0;       // steps taken, where the state holds no count
  int64_t next = 0;        // the step that a GPU takes next, if its count is left alone
  int32_t group = 0;
  int32_t bucket = 0;
  int64_t place = 0;       // of its gradient's address in what `grads` fills
  bool elsewhere = false;  // another table steps it
  bool active = false;
  bool reported = false;  // active when `stepped` was last asked
  int64_t untouched = 0;

  int64_t next_step() const {
    if (step == nullptr) return count + 1;
    return int64_t(step_is_double ? *static_cast<double*>(step) : *static_cast<float*>(step)) + 1;
  }
  void advance() {
    if (step == nullptr) {
      count = 1;
    } else if (step_is_double) {
      *static_cast<double*>(step) += 1;
    } else {
      *static_cast<float*>(step) += 1;
    }
  }
};

// The scalars of one group and step count.
struct Bucket {
  double group;
  StepScalars scalars;
};

class Table {
 public:
  enum Status : int64_t { kStale = -1, kMissingBucket = -2 };

  Table(Rule rule, DLPackExchangeAPI* api)
      : rule_(rule),
        reader_(api),
        grad_name_(PyUnicode_InternFromString("grad")),
        local_name_(PyUnicode_InternFromString("_local_tensor")) {}
  ~Table() {
    clear();
    Py_DECREF(grad_name_);
    Py_DECREF(local_name_);
  }
  Table(const Table&) = delete;

  std::vector<Entry> entries;

  // Drops every reference, here and when the cyclic collector asks: parameters can refer to their
  // optimizer through hooks.
  void clear() {
    std::vector<Entry> dropped;
    dropped.swap(entries);
    for (Entry& e : dropped) {
      each_object(e, [](PyObject* object) { Py_XDECREF(object); });
    }
  }

  // Calls visit with every object that the table owns.
  template <typename Visit>
  static void each_object(const Entry& e, const Visit& visit) {
    visit(e.param);
    visit(e.key);
    visit(e.state);
    visit(e.grad);
    for (const auto* list : {&e.keys, &e.values, &e.held}) {
      for (PyObject* object : *list) visit(object);
    }
  }

  // Takes the state of an entry as it is now, and holds its memory.
  void watch(Entry& e, PyObject* key, PyObject* value) {
    e.keys.push_back(Py_NewRef(key));
    e.values.push_back(Py_NewRef(value));
    e.addresses.push_back(address(e, value));
    PyObject* local = local_of(e, value);
    if (PyObject* held = reader_.hold(local)) e.held.push_back(held);
    Py_DECREF(local);
    elements_watched_ += e.row.numel;
  }

  // Takes the device of an entry's parameter; the plan knows the rest of its layout.
  void take_device(Entry& e) {
    void* data = nullptr;
    if (read(e, e.param, data)) e.layout.device = scratch_.device;
    PyErr_Clear();
  }

  // Checks every parameter, state and gradient against the table and takes the gradients'
  // addresses. `groups` is a list of lists of parameters; `grads` a list aligned with them, or null
  // to read
  // `.grad`; `states` the dict of all state.
  // False: something changed, and the table must be built anew. Writes nothing but the table.
  bool refresh(PyObject* groups, PyObject* grads, PyObject* states) {
    release_grads();
    size_t at = 0;
    ++refreshes_;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups); ++i) {
      PyObject* params = PyList_GET_ITEM(groups, i);
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(params); ++j, ++at) {
        if (at >= entries.size()) return false;
        Entry& e = entries[at];
        if (e.param != PyList_GET_ITEM(params, j) || e.group != i) return false;
        PyObject* grad = grads == nullptr ? nullptr : PyList_GET_ITEM(grads, Py_ssize_t(at));
        if (!refresh(e, grad, states, checks_addresses(at))) return false;
      }
    }
    return at == entries.size();
  }

  // The update of every active row, in one parallel region; the number of elements left untouched.
  int64_t run(const Bucket* buckets, int64_t n, double grad_scale, bool guard) {
    for (Entry& e : entries) {
      if (e.active && !find_bucket(e, buckets, n)) return kMissingBucket;
    }
    scalars_.assign(size_t(n), {});
    for (int64_t i = 0; i < n; ++i) {
      scalars_[size_t(i)] = buckets[i].scalars;
      scalars_[size_t(i)].grad_scale *= grad_scale;
    }
    share_out(1);
    for_each_share([&](Entry& e, int64_t begin, int64_t end) {
      const int64_t untouched =
          kernels().update(rule_, e.row, scalars_[size_t(e.bucket)], guard, begin, end);
      if (untouched > 0) __atomic_fetch_add(&e.untouched, untouched, __ATOMIC_RELAXED);
    });
    int64_t total = 0;
    for (Entry& e : entries) {
      if (!e.active) continue;
      e.advance();
      total += e.untouched;
    }
    return total;
  }

  // Sum of squares of all gradients: partial sums over fixed chunks, added in a fixed order.
  double sum_squares() {
    constexpr int64_t kChunk = 64;  // blocks: 8,192 elements
    share_out(kChunk);
    partial_.assign(size_t(offsets_.empty() ? 0 : offsets_.back()), 0.0);
    for_each_share([&](Entry& e, int64_t begin, int64_t end) {
      const int64_t first = offsets_[size_t(&e - entries.data())];
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t stop = std::min((chunk + 1) * kChunk, e.row.blocks());
        partial_[size_t(first + chunk)] = kernels().sum_squares(e.row, chunk * kChunk, stop);
      }
    });
    double total = 0;
    for (const double partial : partial_) total += partial;
    return total;
  }

  // Writes where the gradients lie, each to its place; whether any lies elsewhere than `to` said.
  bool grads(int64_t* to) const {
    bool moved = false;
    for (const Entry& e : entries) {
      if (!e.active) continue;
      const int64_t at = reinterpret_cast<int64_t>(e.row.grad.data);
      moved |= to[e.place] != at;
      to[e.place] = at;
    }
    return moved;
  }

  // Whether all counts are as `advance` has left them.
  bool counts_hold() const {
    for (const Entry& e : entries) {
      if (e.active && e.step != nullptr && e.next_step() != e.next) return false;
    }
    return true;
  }

  // Counts a step that a GPU takes.
  void advance() {
    for (Entry& e : entries) {
      if (!e.active) continue;
      e.advance();
      e.next = e.next_step();
    }
  }

  // Whether other parameters have a gradient than when `stepped` was last asked.
  bool changed() const { return changed_; }

  // The parameters that the last step took; a new list.
  PyObject* stepped() {
    changed_ = false;
    PyObject* list = PyList_New(0);
    for (Entry& e : entries) {
      e.reported = e.active;
      if (e.active && list != nullptr && PyList_Append(list, e.param) != 0) Py_CLEAR(list);
    }
    return list;
  }

  void release_grads() {
    for (Entry& e : entries) Py_CLEAR(e.grad);
  }

 private:
  bool refresh(Entry& e, PyObject* given, PyObject* states, bool addresses) {
    if (e.elsewhere) return true;
    PyObject* grad = given != nullptr ? Py_NewRef(given) : PyObject_GetAttr(e.param, grad_name_);
    if (grad == nullptr) {
      PyErr_Clear();
      return false;
    }
    e.grad = grad;
    e.untouched = 0;
    e.active = false;
    changed_ |= e.reported != (grad != Py_None);
    if (grad == Py_None) return true;
    if (e.state == nullptr) return false;  // its first gradient
    if (!e.keys.empty() && lookup(states, e) != e.state) return false;
    for (size_t k = 0; k < e.keys.size(); ++k) {
      if (PyDict_GetItem(e.state, e.keys[k]) != e.values[k]) return false;
      if (addresses && address(e, e.values[k]) != e.addresses[k]) return false;
    }
    if (size_t(PyDict_GET_SIZE(e.state)) != e.keys.size()) return false;
    void* data = nullptr;
    if (!read(e, e.param, data) || scratch_ != e.layout || data != e.row.param.data) return false;
    const uint64_t ones = scratch_.ones;
    if (!reader_.is_plain(grad, e.lazy_grad) || !read(e, grad, data)) return false;
    if (scratch_.format != e.row.grad.format || scratch_.extents != e.layout.extents) return false;
    if (scratch_.device != e.layout.device || scratch_.ones != ones) return false;
    e.row.grad.data = data;
    e.active = true;
    return true;
  }

  // Whether this step looks if state tensors have been given other memory (`tensor.data = ...`). To
  // ask a cold tensor costs 0.2 µs, which doubles the step of 2,000 tensors of 1,000 elements
  // (docs/log.md): where tensors are small they are asked in turn, some in every step, so that a
  // loop over all state (to move it, say) is noticed at once. Their memory is held meanwhile.
  bool checks_addresses(size_t at) const {
    constexpr int64_t kLarge = 8192;
    if (elements_watched_ >= kLarge * int64_t(entries.size())) return true;
    return (at + refreshes_) % std::min<size_t>(16, entries.size()) == 0;
  }

  void* address(const Entry& e, PyObject* object) const {
    PyObject* local = local_of(e, object);
    void* data = reader_.address(local);
    Py_DECREF(local);
    return data;
  }

  // The hash of a tensor is a call into Python; the one taken when the row was added still holds.
  static PyObject* lookup(PyObject* states, const Entry& e) {
#if PY_VERSION_HEX < 0x030D0000
    return _PyDict_GetItem_KnownHash(states, e.key, e.hash);
#else
    return PyDict_GetItemWithError(states, e.key);
#endif
  }

  bool read(const Entry& e, PyObject* object, void*& data) {
    PyObject* local = local_of(e, object);
    const bool ok = reader_.read(local, data, scratch_);
    Py_DECREF(local);  // its owner is held by the parameter or the entry
    return ok;
  }

  // The shard of a distributed tensor, or the object itself; a new reference.
  PyObject* local_of(const Entry& e, PyObject* object) const {
    PyObject* local = e.local ? PyObject_GetAttr(object, local_name_) : nullptr;
    if (local != nullptr) return local;
    PyErr_Clear();
    return Py_NewRef(object);
  }

  static bool find_bucket(Entry& e, const Bucket* buckets, int64_t n) {
    const double step = double(e.next_step());
    const auto matches = [&](int64_t i) {
      return buckets[i].group == e.group && buckets[i].scalars.step == step;
    };
    if (e.bucket < n && matches(e.bucket)) return true;
    for (int64_t i = 0; i < n; ++i) {
      if (matches(i)) {
        e.bucket = int32_t(i);
        return true;
      }
    }
    return false;
  }

  // Running totals of the active rows' units of `unit` blocks each.
  void share_out(int64_t unit) {
    offsets_.assign(1, 0);
    elements_ = 0;
    for (const Entry& e : entries) {
      const int64_t units = e.active ? (e.row.blocks() + unit - 1) / unit : 0;
      offsets_.push_back(offsets_.back() + units);
      if (e.active) elements_ += e.row.numel;
    }
  }

  // Splits the units evenly over the threads, whatever tensors they belong to.
  template <typename Body>
  void for_each_share(const Body& body) {
    constexpr int64_t kSerial =
        32768;  // elements: below this a parallel region costs more than it saves
    Threads& pool = Threads::instance();
    pool.run(elements_ < kSerial ? 1 : pool.count(), [&](int thread, int threads) {
      int64_t at = offsets_.back() * thread / threads;
      const int64_t stop = offsets_.back() * (thread + 1) / threads;
      if (at >= stop) return;
      size_t row =
          size_t(std::upper_bound(offsets_.begin(), offsets_.end(), at) - offsets_.begin()) - 1;
      for (; at < stop; ++row) {
        const int64_t end = std::min(offsets_[row + 1], stop);
        if (end > at) body(entries[row], at - offsets_[row], end - offsets_[row]);
        at = std::max(at, end);
      }
    });
  }

  Rule rule_;
  TensorReader reader_;
  PyObject* grad_name_;
  PyObject* local_name_;
  Layout scratch_;
  std::vector<int64_t> offsets_;
  std::vector<double> partial_;
  std::vector<StepScalars> scalars_;
  bool changed_ = false;
  int64_t elements_ = 0;
  int64_t elements_watched_ = 0;  // of all state arrays
  size_t refreshes_ = 0;
};

}  // namespace ebbtide
