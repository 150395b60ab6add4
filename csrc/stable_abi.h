// A Python module in the stable ABI (PEP 384), which every Python from 3.11 on loads without another compilation.
// Functions take keywords alone. What a function throws becomes Python's error: Error is one that is set already,
// value_error a ValueError, Refusal the class of that name in the module, and everything else a RuntimeError.
#pragma once

#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#pragma GCC visibility push(hidden)  // another module of these sources has a class and functions of its own
namespace ldmq::python {

struct Error {};

class value_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A call that the kernels do not serve, though its arguments make sense: another backend may.
class Refusal : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Other threads of Python run while it lives.
class gil_scoped_release {
 public:
  gil_scoped_release() : state_(PyEval_SaveThread()) {}
  ~gil_scoped_release() { PyEval_RestoreThread(state_); }
  gil_scoped_release(const gil_scoped_release&) = delete;
  gil_scoped_release& operator=(const gil_scoped_release&) = delete;

 private:
  PyThreadState* state_;
};

// An owned reference, null where Python could not make the object.
class Reference {
 public:
  explicit Reference(PyObject* object) : object_(object) {
    if (!object) throw Error();
  }
  ~Reference() { Py_XDECREF(object_); }
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

template <typename T>
T from_python(PyObject* value) {
  if constexpr (std::is_same_v<T, bool>) {
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) throw Error();
    return truth != 0;
  } else if constexpr (std::is_same_v<T, uintptr_t>) {
    const unsigned long long number = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred()) throw Error();
    return number;
  } else if constexpr (std::is_integral_v<T>) {
    const long long number = PyLong_AsLongLong(value);
    if (PyErr_Occurred()) throw Error();
    if (number < std::numeric_limits<T>::min() || number > std::numeric_limits<T>::max()) {
      PyErr_Format(PyExc_OverflowError, "%lld is too large", number);
      throw Error();
    }
    return static_cast<T>(number);
  } else if constexpr (std::is_same_v<T, double>) {
    const double number = PyFloat_AsDouble(value);
    if (PyErr_Occurred()) throw Error();
    return number;
  } else if constexpr (std::is_same_v<T, std::string>) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(value, &size);
    if (!text) throw Error();
    return {text, static_cast<size_t>(size)};
  } else {
    static_assert(std::is_same_v<T, std::vector<int64_t>>, "no such argument");
    const Py_ssize_t size = PyTuple_Size(value);
    if (size < 0) throw Error();
    T numbers;
    for (Py_ssize_t i = 0; i < size; ++i) numbers.push_back(from_python<int64_t>(PyTuple_GetItem(value, i)));
    return numbers;
  }
}

inline PyObject* to_python(const char* text) { return PyUnicode_FromString(text); }
inline PyObject* to_python(int64_t number) { return PyLong_FromLongLong(number); }
inline PyObject* to_python(int number) { return PyLong_FromLong(number); }
inline PyObject* to_python(bool truth) { return PyBool_FromLong(truth); }

template <typename... Values>
PyObject* to_python(const std::tuple<Values...>& values) {
  Reference made(PyTuple_New(sizeof...(Values)));
  Py_ssize_t place = 0;
  std::apply(
      [&](const auto&... value) {
        (PyTuple_SetItem(made.get(), place++, Reference(to_python(value)).release()), ...);
      },
      values);
  return made.release();
}

template <typename Value>
PyObject* to_python(const std::vector<Value>& values) {
  Reference made(PyList_New(static_cast<Py_ssize_t>(values.size())));
  for (size_t i = 0; i < values.size(); ++i) {
    PyList_SetItem(made.get(), static_cast<Py_ssize_t>(i), Reference(to_python(values[i])).release());
  }
  return made.release();
}

// The name of an argument.
using arg = std::string;

// A function of the module, and what Python keeps a pointer to: it is never destroyed.
struct Function {
  std::string name;
  std::vector<arg> arguments;
  std::function<PyObject*(PyObject* const*)> call;
  PyMethodDef method;
};

template <typename Result, typename... Values, size_t... Places>
PyObject* invoke(Result (*function)(Values...), PyObject* const* given, std::index_sequence<Places...>) {
  const std::tuple<std::decay_t<Values>...> values{from_python<std::decay_t<Values>>(given[Places])...};
  if constexpr (std::is_void_v<Result>) {
    function(std::get<Places>(values)...);
    Py_INCREF(Py_None);
    return Py_None;
  } else {
    return to_python(function(std::get<Places>(values)...));
  }
}

// The arguments in the function's own order. Callers mostly give them in it: each is looked for from its place on.
inline std::vector<PyObject*> in_order(const Function& function, PyObject* const* values, PyObject* names) {
  const size_t count = function.arguments.size();
  const size_t named = names ? static_cast<size_t>(PyTuple_Size(names)) : 0;
  std::vector<PyObject*> given(count, nullptr);
  for (size_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GetItem(names, static_cast<Py_ssize_t>(i));
    size_t tried = 0;
    while (tried < count &&
           PyUnicode_CompareWithASCIIString(name, function.arguments[(i + tried) % count].c_str()) != 0) {
      ++tried;
    }
    if (tried == count) {
      PyErr_Format(PyExc_TypeError, "%s() has no argument %R", function.name.c_str(), name);
      throw Error();
    }
    given[(i + tried) % count] = values[i];
  }
  for (size_t i = 0; i < count; ++i) {
    if (given[i]) continue;
    PyErr_Format(PyExc_TypeError, "%s() needs the argument '%s'", function.name.c_str(), function.arguments[i].c_str());
    throw Error();
  }
  return given;
}

// The module that is being made.
class module_ {
 public:
  explicit module_(PyObject* module) : module_object_(module) {
    refusal_class() = PyErr_NewException("ldmq_kernels.kernels.cuda._binding.Refusal", nullptr, nullptr);
    if (PyModule_AddObjectRef(module, "Refusal", refusal_class()) < 0) throw Error();
  }

  template <typename Result, typename... Values, typename... Names>
  void def(const char* name, Result (*function)(Values...), const char* doc, Names... names) {
    static_assert(sizeof...(Values) == sizeof...(Names), "each argument has a name");
    static std::deque<Function> functions;
    Function& made = functions.emplace_back();
    made.name = name;
    made.arguments = {std::move(names)...};
    made.call = [function](PyObject* const* given) {
      return invoke(function, given, std::index_sequence_for<Values...>());
    };
    made.method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&run)),
                   METH_FASTCALL | METH_KEYWORDS, doc};
    Reference self(PyCapsule_New(&made, nullptr, nullptr));
    Reference callable(PyCFunction_NewEx(&made.method, self.get(), nullptr));
    if (PyModule_AddObjectRef(module_object_, name, callable.get()) < 0) throw Error();
  }

 private:
  static PyObject*& refusal_class() {
    static PyObject* found = nullptr;
    return found;
  }

  static PyObject* run(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    const auto* function = static_cast<const Function*>(PyCapsule_GetPointer(self, nullptr));
    if (!function) return nullptr;
    try {
      if (positional > 0) {
        PyErr_Format(PyExc_TypeError, "%s() takes keyword arguments alone", function->name.c_str());
        return nullptr;
      }
      return function->call(in_order(*function, values, names).data());
    } catch (const Error&) {
    } catch (const Refusal& error) {
      PyErr_SetString(refusal_class(), error.what());
    } catch (const value_error& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  PyObject* module_object_;
};

}  // namespace ldmq::python
#pragma GCC visibility pop
