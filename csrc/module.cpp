// The Python module zoengine._C. Importing it registers the ops; its functions tell what was built and choose the
// instruction set. It uses only the limited API, so one file serves every Python from 3.10 on.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/dispatch.h"
#if defined(ZO_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace {

PyObject* cpu_isas(PyObject*, PyObject*) {
  const auto& list = zo::cpu::available();
  PyObject* names = PyTuple_New(static_cast<Py_ssize_t>(list.size()));
  if (!names) return nullptr;
  for (size_t i = 0; i < list.size(); ++i) {
    PyObject* name = PyUnicode_FromString(list[i]->name);
    if (!name || PyTuple_SetItem(names, static_cast<Py_ssize_t>(i), name) < 0) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  return names;
}

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(zo::cpu::kernels().name); }

PyObject* set_cpu_isa(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  if (!zo::cpu::choose(name)) {
    PyErr_Format(PyExc_ValueError, "instruction set '%s' is not available on this CPU or in this build", name);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* has_cuda(PyObject*, PyObject*) {
#if defined(ZO_WITH_CUDA)
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

PyObject* cuda_error(PyObject*, PyObject*) {
#if defined(ZO_WITH_CUDA)
  cudaError_t error = zo::cuda::check_device();
  return PyUnicode_FromString(error == cudaSuccess ? "" : cudaGetErrorString(error));
#else
  return PyUnicode_FromString("");
#endif
}

PyMethodDef methods[] = {
    {"cpu_isas", cpu_isas, METH_NOARGS, "Names of the instruction sets that this CPU runs, the best first."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "Name of the instruction set in use."},
    {"set_cpu_isa", set_cpu_isa, METH_VARARGS, "Use the named instruction set from now on; '' means the best."},
    {"has_cuda", has_cuda, METH_NOARGS, "Whether the CUDA kernels were built."},
    {"cuda_error", cuda_error, METH_NOARGS, "Why the CUDA kernels do not run on the current device; '' if they do."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
