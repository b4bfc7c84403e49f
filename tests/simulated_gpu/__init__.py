"""A GPU for tests on machines without one: ``python -m simulated_gpu MODULE ...`` runs a module as if there were one.

Tensors on "cuda" live in the host's memory and torch's ops on them run their CPU kernels. The project's own CUDA C++ is
compiled as host code and run block by block, its threads as fibers (runtime.cpp), so that launches, shared memory,
barriers and shuffles are what is in csrc/cuda. Seen are: other bits than the CPU kernels', accesses out of bounds or
misaligned, missing barriers, tensors on the wrong device, what a graph capture would refuse. Not seen are: what nvcc
makes of the code, its intrinsics and inline PTX, races between blocks, time. Needs a torch without CUDA and a C++
compiler on x86-64.
"""
