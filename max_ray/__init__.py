"""max_ray: an inference server for large language models: the pipeline system of Modular's MAX on Ray and PyTorch."""

__version__ = "0.1.0"
