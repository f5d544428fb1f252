"""Parts of benchmarks/gpu_window.sh."""
