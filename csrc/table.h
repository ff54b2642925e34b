// The table of one optimizer: a row a parameter, checked and refreshed in each step.
#pragma once
#include <Python.h>

#include <cmath>
#include <limits>
#include <vector>

#include "entry.h"
#include "groups.h"
#include "parallel.h"
#include "step.h"
#include "tensor.h"

namespace ebbtide {

const Kernels& kernels();  // chosen once, for this machine

// The scalars of one group and step count.
struct Bucket {
  int32_t group;
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
  Groups groups;
  double norm = 0;  // of the gradients that were clipped last, before clipping

  // Drops every reference, here and when the cyclic collector asks: parameters can refer to their
  // optimizer through hooks.
  void clear() {
    std::vector<PyObject*> dropped;
    each_object([&](PyObject* object) { dropped.push_back(object); });
    entries.clear();
    watched_.clear();
    held_.clear();
    for (PyObject* object : dropped) Py_XDECREF(object);
    groups.clear();
  }

  // Calls visit with every object that the rows own.
  template <typename Visit>
  void each_object(const Visit& visit) const {
    for (const Entry& e : entries) {
      visit(e.param);
      visit(e.state);
      visit(e.key);
      visit(e.grad);
    }
    for (const Watched& w : watched_) {
      visit(w.key);
      visit(w.value);
    }
    for (PyObject* object : held_) visit(object);
  }

  // Adds an entry with the shapes and strides of its row.
  Entry& add(Entry e, const std::vector<int64_t>& extents) {
    e.watched = uint32_t(watched_.size());
    e.extents = uint32_t(extents_.size());
    e.dims = uint16_t(extents.size());
    extents_.insert(extents_.end(), extents.begin(), extents.end());
    entries.push_back(e);
    return entries.back();
  }

  // Takes a value of the state of the entry added last, and holds its memory.
  void watch(Entry& e, PyObject* key, PyObject* value) {
    watched_.push_back({Py_NewRef(key), Py_NewRef(value), address(e, value)});
    ++e.values;
    PyObject* local = local_of(e, value);
    if (PyObject* held = reader_.hold(local)) held_.push_back(held);
    Py_DECREF(local);
    elements_watched_ += e.row.numel;
  }

  // Takes the device of an entry's parameter; the plan knows the rest of its layout.
  void take_device(Entry& e) {
    void* data = nullptr;
    PyObject* local = local_of(e, e.param);
    if (reader_.read(local, data, scratch_)) e.device = scratch_.device;
    Py_DECREF(local);
  }

  // Checks every parameter, state and gradient against the table and takes the gradients'
  // addresses. `params` holds a list of parameters for each group, or is null to take
  // `group["params"]`; `grads` is a list aligned with them, or null to read `.grad`; `states` the
  // dict of all state. False: something changed, and the table must be built anew. Writes nothing
  // but the table.
  bool refresh(PyObject* params, PyObject* grads, PyObject* states) {
    release_grads();
    ++refreshes_;
    const bool fresh = refresh_all(params, grads, states);
    if (!fresh) release_grads();
    return fresh;
  }

  // Gives every active row its scalars, from the groups; false where a step count is no count.
  bool prepare() {
    buckets_.clear();
    latest_.assign(groups.size(), -1);
    for (Entry& e : entries) {
      if (!e.active) continue;
      const int64_t step = e.next_step();
      if (step < 1) return false;
      e.bucket = find(e.group, double(step));
      if (e.bucket >= 0) continue;
      e.bucket = latest_[size_t(e.group)] = int32_t(buckets_.size());
      buckets_.push_back({e.group, groups.recipe(size_t(e.group)).at(step)});
    }
    return true;
  }

  // Gives every active row its scalars, from these; false where a row finds none.
  bool prepare(std::vector<Bucket> buckets) {
    buckets_ = std::move(buckets);
    latest_.assign(entries.empty() ? 0 : size_t(entries.back().group) + 1, 0);
    for (Entry& e : entries) {
      if (e.active && (e.bucket = find(e.group, double(e.next_step()))) < 0) return false;
    }
    return true;
  }

  // The update of every active row, in one parallel region; the number of elements left untouched.
  int64_t run(double grad_scale, bool guard) {
    for (Bucket& bucket : buckets_) bucket.scalars.grad_scale *= grad_scale;
    share_out(1);
    for_each_share([&](Entry& e, int64_t begin, int64_t end) {
      const StepScalars& scalars = buckets_[size_t(e.bucket)].scalars;
      const int64_t untouched = kernels().update(rule_, e.row, scalars, guard, begin, end);
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

  // What clips the gradients, times grad_scale, to this norm, as `plan.clip_scale`; NaN where their
  // norm is not finite.
  double clip(double grad_scale, double max_norm) {
    norm = std::sqrt(sum_squares() * (grad_scale * grad_scale));
    if (!std::isfinite(norm)) return std::numeric_limits<double>::quiet_NaN();
    return std::min(1.0, max_norm / (norm + 1e-6));
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
  bool refresh_all(PyObject* params, PyObject* grads, PyObject* states) {
    const size_t lists = params == nullptr ? groups.size() : size_t(PyList_GET_SIZE(params));
    size_t at = 0;
    for (size_t i = 0; i < lists; ++i) {
      PyObject* list =
          params == nullptr ? groups.params(i) : PyList_GET_ITEM(params, Py_ssize_t(i));
      if (list == nullptr || !PyList_Check(list)) return false;
      for (Py_ssize_t j = 0; j < PyList_GET_SIZE(list); ++j, ++at) {
        if (at >= entries.size()) return false;
        Entry& e = entries[at];
        if (e.param != PyList_GET_ITEM(list, j) || e.group != int32_t(i)) return false;
        PyObject* grad = grads == nullptr ? nullptr : PyList_GET_ITEM(grads, Py_ssize_t(at));
        if (!refresh(e, grad, states, checks_addresses(at))) return false;
      }
    }
    return at == entries.size();
  }

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
    if (!holds_state(e, states, addresses)) return false;
    void* data = nullptr;
    if (!reads_as(e, e.param, e.row.param.format, data) || data != e.row.param.data) return false;
    if (scratch_.read_only) return false;
    const uint64_t ones = scratch_.ones;
    if (!reader_.is_plain(grad, e.lazy_grad)) return false;
    if (!reads_as(e, grad, e.row.grad.format, data) || scratch_.ones != ones) return false;
    if (data == nullptr && e.row.numel > 0) return false;  // its memory has been given back
    e.row.grad.data = data;
    e.active = true;
    return true;
  }

  // Whether the state of a parameter is what it was.
  bool holds_state(const Entry& e, PyObject* states, bool addresses) const {
    if (e.values > 0 && lookup(states, e) != e.state) return false;
    if (PyDict_GET_SIZE(e.state) != e.values) return false;
    const Watched* known = watched_.data() + e.watched;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(e.state, &at, &key, &value); ++known) {
      if (key != known->key || value != known->value) return false;
      if (addresses && address(e, value) != known->address) return false;
    }
    return true;
  }

  // Whether this step looks if state tensors have been given other memory (`tensor.data = ...`). To
  // ask a cold tensor costs 0.2 µs, which doubles the step of 2,000 tensors of 1,000 elements
  // (docs/log.md): where many are small they are asked in turn, some in every step, so that a loop
  // over all state (to move it, say) is noticed at once. Their memory is held meanwhile.
  bool checks_addresses(size_t at) const {
    constexpr int64_t kLarge = 8192;
    constexpr size_t kMany = 128;
    if (entries.size() <= kMany) return true;
    if (elements_watched_ >= kLarge * int64_t(entries.size())) return true;
    return (at + refreshes_) % 16 == 0;
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

  // Whether a tensor has this format and the layout of the row.
  bool reads_as(const Entry& e, PyObject* object, Format format, void*& data) {
    PyObject* local = local_of(e, object);
    const bool ok = reader_.read(local, data, scratch_);
    Py_DECREF(local);  // its owner is held by the parameter or the entry
    const std::vector<int64_t>& found = scratch_.extents;
    return ok && scratch_.format == format && scratch_.device == e.device &&
           found.size() == e.dims &&
           std::equal(found.begin(), found.end(), extents_.begin() + e.extents);
  }

  // The shard of a distributed tensor, or the object itself; a new reference.
  PyObject* local_of(const Entry& e, PyObject* object) const {
    PyObject* local = e.local ? PyObject_GetAttr(object, local_name_) : nullptr;
    if (local != nullptr) return local;
    PyErr_Clear();
    return Py_NewRef(object);
  }

  // The index of the scalars of a group and step count; -1 if there are none. Mostly all rows of a
  // group take the same step.
  int32_t find(int32_t group, double step) const {
    const auto matches = [&](const Bucket& b) {
      return b.group == group && b.scalars.step == step;
    };
    const int32_t latest = latest_[size_t(group)];
    if (latest < 0) return -1;
    if (size_t(latest) < buckets_.size() && matches(buckets_[size_t(latest)])) return latest;
    const auto found = std::find_if(buckets_.begin(), buckets_.end(), matches);
    return found == buckets_.end() ? -1 : int32_t(found - buckets_.begin());
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
  std::vector<Watched> watched_;  // of all entries in turn
  std::vector<int64_t> extents_;  // likewise
  std::vector<PyObject*> held_;   // the memory of what is watched
  std::vector<int64_t> offsets_;
  std::vector<double> partial_;
  std::vector<Bucket> buckets_;  // of the step that is taken
  std::vector<int32_t> latest_;  // by group: the bucket made last
  bool changed_ = false;
  int64_t elements_ = 0;
  int64_t elements_watched_ = 0;  // of all state arrays
  size_t refreshes_ = 0;
};

}  // namespace ebbtide
