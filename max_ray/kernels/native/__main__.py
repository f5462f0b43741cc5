"""`python -m max_ray.kernels.native`: compiles the C++ kernels ahead of the first start (`make setup` does it)."""

from __future__ import annotations

from max_ray.kernels.native.build import library

if __name__ == "__main__":
    print("The C++ kernels are ready." if library() else "No C++ kernels here: the CPU runs torch's operations.")
