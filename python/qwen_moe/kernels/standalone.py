"""`python standalone.py --arch 90 --out DIR`: the compiler where the core is not built yet."""

import runpy
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    # This folder must not be a place for top-level modules, and the package behind it is not run.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != folder]
    package = types.ModuleType("qwen_moe")
    package.__path__ = [str(folder.parent)]
    sys.modules["qwen_moe"] = package
    runpy.run_module("qwen_moe.kernels", run_name="__main__", alter_sys=True)
