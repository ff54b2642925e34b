// What the table keeps of one parameter.
#pragma once
#include <Python.h>

#include <cstdint>

#include "step.h"

namespace ebbtide {

// A row and what must still be true of it when the next step begins. What is read in every step
// lies together: with thousands of small tensors each line of memory counts.
struct Entry {
  PyObject* param = nullptr;  // the object in param_groups
  PyObject* state = nullptr;  // its state dict; null while the parameter has had no gradient
  PyObject* key = nullptr;    // under which the optimizer keeps its state
  Py_hash_t hash = 0;
  PyObject* grad = nullptr;  // held while a step runs
  uint32_t watched = 0;      // where its state begins in `watched_`
  uint32_t extents = 0;      // and its layout in `extents_`
  uint16_t values = 0;       // how many there are
  uint16_t dims = 0;
  int64_t device = 0;  // as DLPack numbers it
  int32_t group = 0;
  int32_t bucket = 0;
  bool elsewhere = false;  // another table steps it
  bool active = false;
  bool reported = false;   // active when `stepped` was last asked
  bool local = false;      // a DTensor: the row is its `_local_tensor`
  bool lazy_grad = false;  // its gradient may be a lazy conjugate or negative
  bool step_is_double = false;
  void* step = nullptr;  // the step count: float32, or float64
  int64_t count = 0;     // steps taken, where the state holds no count
  int64_t next = 0;      // the step that a GPU takes next, if its count is left alone
  int64_t place = 0;     // of its gradient's address in what `grads` fills
  int64_t untouched = 0;
  Row row;

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

// A value in the state of a parameter, as it was when addresses were taken.
struct Watched {
  PyObject* key;
  PyObject* value;
  void* address;  // null where it is no tensor
};

}  // namespace ebbtide
