// How the binding looks at a tensor: torch's through its DLPack exchange table, NumPy's through the
// buffer protocol. Both cost tens of nanoseconds where attribute access in Python costs
// microseconds.
#pragma once
#include <Python.h>

#include <cstdint>
#include <vector>

#include "step.h"

namespace ebbtide {

// The part of the DLPack 1.x ABI (dmlc/dlpack, dlpack.h) that is read here.
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void* unused[3];  // allocator, managed tensor from and to a Python object
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
};

// Shape and strides in elements; dimensions of one element are left out, as their stride says
// nothing.
struct Layout {
  Format format = Format::kF32;
  int64_t device = 0;            // as DLPack numbers it
  std::vector<int64_t> extents;  // shape, stride, shape, stride, ...
  uint64_t ones = 0;             // which dimensions were left out, and how many there are in all
  bool read_only = false;        // a NumPy array that must not be written to
};

class TensorReader {
 public:
  explicit TensorReader(DLPackExchangeAPI* api) : api_(api) {
    if (api_ != nullptr) return;
    PyObject* numpy = PyImport_ImportModule("numpy");
    if (numpy != nullptr) array_type_ = PyObject_GetAttrString(numpy, "ndarray");
    Py_XDECREF(numpy);
    PyErr_Clear();
  }
  ~TensorReader() { Py_XDECREF(array_type_); }
  TensorReader(const TensorReader&) = delete;

  // Whether memory is all there is to a gradient: an array of no subclass (one may hide elements),
  // a tensor that reads as it lies. torch sets the bits of lazy conjugates and negatives where the
  // pointer does not show them; `lazy` says whether a gradient could have one.
  bool is_plain(PyObject* grad, bool lazy) const {
    if (api_ == nullptr) return static_cast<void*>(Py_TYPE(grad)) == array_type_;
    return !lazy || !(answers(grad, "is_conj") || answers(grad, "is_neg"));
  }

  // Reads the address of a tensor of any type; null where the object is none, or is read-only.
  void* address(PyObject* object) const {
    if (api_ == nullptr) {
      Py_buffer b;
      if (PyObject_GetBuffer(object, &b, PyBUF_RECORDS) == 0) {
        void* data = b.buf;
        PyBuffer_Release(&b);
        return data;
      }
    } else if (DLTensor t; api_->dltensor_from_py_object_no_sync(object, &t) == 0) {
      return static_cast<char*>(t.data) + t.byte_offset;
    }
    PyErr_Clear();
    return nullptr;
  }

  // An object that keeps the tensor's memory alive, whatever is done to the tensor: another tensor
  // over it. (A NumPy array cannot let go of its memory while it is referenced.)
  PyObject* hold(PyObject* object) const {
    PyObject* held = api_ == nullptr ? nullptr : PyObject_CallMethod(object, "detach", nullptr);
    PyErr_Clear();
    return held;
  }

  // Reads address and layout; false (with no Python error set) where the object is not a plain
  // tensor in the memory of this machine or of a GPU.
  bool read(PyObject* object, void*& data, Layout& layout) const {
    const bool ok =
        api_ != nullptr ? read_torch(object, data, layout) : read_buffer(object, data, layout);
    return ok && reinterpret_cast<uintptr_t>(data) % itemsize(layout.format) == 0;
  }

 private:
  static uintptr_t itemsize(Format format) {
    return format == Format::kF64 ? 8 : format == Format::kF32 ? 4 : 2;
  }

  static bool answers(PyObject* object, const char* method) {
    PyObject* answer = PyObject_CallMethod(object, method, nullptr);
    const bool yes = answer == nullptr || answer == Py_True;
    Py_XDECREF(answer);
    PyErr_Clear();
    return yes;
  }

  bool read_torch(PyObject* object, void*& data, Layout& layout) const {
    DLTensor t;
    if (api_->dltensor_from_py_object_no_sync(object, &t) != 0) {
      PyErr_Clear();
      return false;
    }
    constexpr int32_t kCpu = 1, kCuda = 2;
    constexpr uint8_t kFloat = 2, kBFloat = 4, kComplex = 5;
    if ((t.device.type != kCpu && t.device.type != kCuda) || t.dtype.lanes != 1) return false;
    layout.device = int64_t(t.device.type) << 32 | t.device.id;
    int complex = 0, bits = t.dtype.bits;
    if (t.dtype.code == kComplex) {
      complex = 1;
      bits /= 2;
    } else if (t.dtype.code != kFloat && t.dtype.code != kBFloat) {
      return false;
    }
    if (bits == 32) {
      layout.format = Format::kF32;
    } else if (bits == 64) {
      layout.format = Format::kF64;
    } else if (bits == 16) {
      layout.format = t.dtype.code == kBFloat ? Format::kBF16 : Format::kF16;
    } else {
      return false;
    }
    layout.extents.clear();
    for (int i = 0; i < t.ndim; ++i) {  // torch has seen to it that a gradient has the shape
      if (t.shape[i] != 1) {
        layout.extents.push_back(t.shape[i]);
        layout.extents.push_back(t.strides[i] << complex);
      }
    }
    if (complex != 0) layout.extents.insert(layout.extents.end(), {2, 1});
    data = static_cast<char*>(t.data) + t.byte_offset;
    return true;
  }

  static bool read_buffer(PyObject* object, void*& data, Layout& layout) {
    Py_buffer b;
    if (PyObject_GetBuffer(object, &b, PyBUF_RECORDS_RO) != 0) {
      PyErr_Clear();
      return false;
    }
    const char type =
        b.format == nullptr ? 'B' : b.format[b.format[0] == '<' || b.format[0] == '='];
    const bool ok = type == 'f' || type == 'd' || type == 'e';
    layout.format = type == 'f' ? Format::kF32 : type == 'd' ? Format::kF64 : Format::kF16;
    layout.read_only = b.readonly != 0;
    layout.extents.clear();
    layout.ones = uint64_t(1) << b.ndim;
    for (int i = 0; ok && i < b.ndim; ++i) {
      layout.ones |= uint64_t(b.shape[i] == 1) << i;
      if (b.shape[i] != 1) {
        layout.extents.push_back(b.shape[i]);
        layout.extents.push_back(b.strides[i] / b.itemsize);
      }
    }
    data = b.buf;
    PyBuffer_Release(&b);
    return ok;
  }

  DLPackExchangeAPI* api_;
  PyObject* array_type_ = nullptr;
};

}  // namespace ebbtide
