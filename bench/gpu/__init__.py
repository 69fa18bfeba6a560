# SPDX-License-Identifier: Apache-2.0
"""One run on a GPU, in stages: see bench/gpu.sh."""
