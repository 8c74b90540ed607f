"""Prefill kernels in Triton, and the compiler that turns them into images ahead of time.

Nothing here imports the rest of `qwen_moe`, so that a build can run the compiler before the core
exists. The kernels never run from Python in the engine: the core loads and launches the images.
"""
