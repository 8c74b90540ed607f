"""`python -m qwen_moe.kernels --arch 90 --out DIR`: compiles the kernels; needs no GPU."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .images import build, build_parallel


def main() -> None:
    """Compiles the table and prints what was made."""
    parser = argparse.ArgumentParser(prog="python -m qwen_moe.kernels", description=__doc__)
    parser.add_argument("--arch", type=int, required=True, help="compute capability, 90 for 9.0")
    parser.add_argument("--out", type=Path, required=True, help="folder for images and manifest")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--share", default="0/1", help="I/N: every N-th kernel from the I-th on")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile all of them")
    options = parser.parse_args()
    began = time.monotonic()
    tty = sys.stderr.isatty()

    def progress(line: str) -> None:
        print(f"\r\x1b[K{line}" if tty else line, end="" if tty else "\n", file=sys.stderr)

    if options.jobs > 1:
        images = build_parallel(
            options.out, options.arch, options.jobs, only=options.only, progress=progress
        )
    else:
        first, step = map(int, options.share.split("/"))
        images = build(
            options.out, options.arch, only=options.only, share=(first, step), progress=progress
        )
    size = sum(len(image.code) for image in images)
    if tty:
        print(file=sys.stderr)
    print(
        f"{len(images)} kernels, {size >> 10} KiB, {time.monotonic() - began:.0f} s: {options.out}"
    )


if __name__ == "__main__":
    main()
