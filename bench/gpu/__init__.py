"""One run on a GPU, in stages: see bench/gpu.sh."""
