// The param groups as they were when they were last read, and the scalars of their steps.
#pragma once
#include <Python.h>

#include <cmath>
#include <utility>
#include <vector>

#include "step.h"

namespace ebbtide {

// What the scalars of a group's steps are computed from: the arithmetic of `Recipe` in rules.py.
struct Recipe {
  StepScalars fixed;
  double beta1, beta2;  // of the bias corrections

  StepScalars at(int64_t step) const {
    StepScalars s = fixed;
    s.step = double(step);
    s.step_size = s.lr / (1 - std::pow(beta1, s.step));
    s.sqrt_bias_correction2 = std::sqrt(1 - std::pow(beta2, s.step));
    if (step == 1) {
      s.buffer_keep = 0;
      s.buffer_add = 1;
    }
    return s;
  }
};

// Reads a tuple of `count` numbers; false, with a Python error set, where it is none.
inline bool read_numbers(PyObject* tuple, int count, double* to) {
  if (tuple == nullptr || !PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != count) {
    PyErr_Format(PyExc_ValueError, "expected a tuple of %d numbers", count);
    return false;
  }
  for (int k = 0; k < count; ++k) to[k] = PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, k));
  return PyErr_Occurred() == nullptr;
}

class Groups {
 public:
  Groups() = default;
  Groups(const Groups&) = delete;
  ~Groups() { clear(); }

  // Reads the groups that are not as they were: `read(index)` gives a Recipe; whether the group is
  // steady, so that it need not be read again while it holds the same objects; and the decay per
  // learning rate, or NaN. Or None where the group has changed so much that the table must be built
  // anew: false then, or with a Python error set.
  bool refresh(PyObject* dicts, PyObject* read) {
    if (!PyList_Check(dicts)) return false;
    for (size_t i = 0; i < size_t(PyList_GET_SIZE(dicts)); ++i) {
      PyObject* dict = PyList_GET_ITEM(dicts, Py_ssize_t(i));
      if (i < groups_.size() && is_as_read(groups_[i], dict)) continue;
      if (!PyDict_Check(dict)) return false;
      Group group = held(dict);
      const bool ok = ask(group, read, i);
      if (i >= groups_.size()) groups_.resize(i + 1);
      std::swap(group, groups_[i]);
      release(group);
      if (!ok) return false;
    }
    drop_from(size_t(PyList_GET_SIZE(dicts)));
    return true;
  }

  // `group["params"]`; null if there is none.
  PyObject* params(size_t index) const { return groups_[index].params; }

  const Recipe& recipe(size_t index) const { return groups_[index].recipe; }
  size_t size() const { return groups_.size(); }

  void clear() { drop_from(0); }

  // Calls visit with every object that is held.
  template <typename Visit>
  void each_object(const Visit& visitor) const {
    for (const Group& group : groups_) visit(group, visitor);
  }

 private:
  struct Group {
    PyObject* dict = nullptr;
    std::vector<PyObject*> contents;  // key, value, key, value, ...
    PyObject* params = nullptr;       // among them
    size_t lr = 0;                    // where the learning rate is among them
    double decay_per_lr = 0;
    Recipe recipe{};
    bool steady = false;
  };

  template <typename Visit>
  static void visit(const Group& group, const Visit& visitor) {
    visitor(group.dict);
    for (PyObject* object : group.contents) visitor(object);
  }
  static void release(const Group& group) {
    visit(group, [](PyObject* object) { Py_XDECREF(object); });
  }

  void drop_from(size_t size) {
    while (groups_.size() > size) {
      const Group dropped = std::move(groups_.back());
      groups_.pop_back();
      release(dropped);
    }
  }

  // Whether a group is as it was read, or only its learning rate another number in range: a
  // schedule changes nothing else, in every step.
  static bool is_as_read(Group& group, PyObject* dict) {
    if (!group.steady || dict != group.dict) return false;
    if (size_t(PyDict_GET_SIZE(dict)) * 2 != group.contents.size()) return false;
    PyObject *key, *value, *lr = nullptr;
    size_t k = 0;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); k += 2) {
      if (key != group.contents[k]) return false;
      if (value == group.contents[k + 1]) continue;
      if (k + 1 != group.lr || !PyFloat_CheckExact(value)) return false;
      lr = value;
    }
    return lr == nullptr || take_rate(group, lr);
  }

  static bool take_rate(Group& group, PyObject* value) {
    const double lr = PyFloat_AS_DOUBLE(value), decay = lr * group.decay_per_lr;
    if (!(lr >= 0 && std::isfinite(lr) && decay < 1)) return false;
    group.recipe.fixed.lr = lr;
    group.recipe.fixed.decay = decay;
    Py_SETREF(group.contents[group.lr], Py_NewRef(value));
    return true;
  }

  // A group with every key and value it holds: while they are held, others in their place have
  // other addresses.
  static Group held(PyObject* dict) {
    Group group;
    group.dict = Py_NewRef(dict);
    group.contents.reserve(2 * size_t(PyDict_GET_SIZE(dict)));
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
      group.contents.push_back(Py_NewRef(key));
      group.contents.push_back(Py_NewRef(value));
      if (!PyUnicode_Check(key)) continue;
      if (PyUnicode_CompareWithASCIIString(key, "params") == 0) group.params = value;
      if (PyUnicode_CompareWithASCIIString(key, "lr") == 0) group.lr = group.contents.size() - 1;
    }
    return group;
  }

  static bool ask(Group& group, PyObject* read, size_t index) {
    PyObject* answer = PyObject_CallFunction(read, "n", Py_ssize_t(index));
    PyObject *recipe, *numbers;
    int steady = 0;
    const bool ok =
        answer != nullptr && answer != Py_None &&
        PyArg_ParseTuple(answer, "O!pd", &PyTuple_Type, &recipe, &steady, &group.decay_per_lr) &&
        PyArg_ParseTuple(recipe, "Odd", &numbers, &group.recipe.beta1, &group.recipe.beta2) &&
        read_numbers(numbers, kScalarCount, reinterpret_cast<double*>(&group.recipe.fixed));
    group.steady = ok && steady != 0;
    Py_XDECREF(answer);
    return ok;
  }

  std::vector<Group> groups_;
};

}  // namespace ebbtide
