"""The kernels of prefill, at the shapes of a model, each with a check."""
