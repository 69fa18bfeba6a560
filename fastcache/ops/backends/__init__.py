# SPDX-License-Identifier: Apache-2.0
"""Kernels in C++ and CUDA C++, with the names and signatures of `fastcache.ops.reference`."""
