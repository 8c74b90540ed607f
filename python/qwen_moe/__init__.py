"""Inference engine for the Qwen3.5 / Qwen3.6 mixture-of-experts models.

>>> import qwen_moe
>>> with qwen_moe.Engine() as engine:
...     print(engine.generate("Once upon a time")[0].text)
"""

from __future__ import annotations

try:
    from qwen_moe import _core
except ImportError as error:
    raise ImportError(
        f"{error}\nThe C++ core of qwen_moe is not built for this Python; build it and install "
        "the package with `pip install .` in the repository",
        name=error.name,
        path=error.path,
    ) from error

from qwen_moe.batch import Generation
from qwen_moe.engine import Engine, ServingCapacity
from qwen_moe.errors import CapacityError, DeviceError, Error, FormatError, InvalidArgument
from qwen_moe.sampling import SamplingParams
from qwen_moe.session import Session, Step
from qwen_moe.tokenizer import Tokenizer

__version__ = _core.__version__

__all__ = [
    "CapacityError",
    "DeviceError",
    "Engine",
    "Error",
    "FormatError",
    "Generation",
    "InvalidArgument",
    "SamplingParams",
    "ServingCapacity",
    "Session",
    "Step",
    "Tokenizer",
    "__version__",
]
