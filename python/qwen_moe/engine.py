"""The engine: weights loaded once, many isolated sessions on them."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_moe import _core, batch, loading, snapshot
from qwen_moe.batch import Generation
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.closing import Closing
from qwen_moe.detokenizer import Detokenizer
from qwen_moe.errors import FormatError, InvalidArgument
from qwen_moe.placement import resolve_devices, resolve_split
from qwen_moe.prefill_kernels import prefill_images
from qwen_moe.sampling import SamplingParams
from qwen_moe.session import Session
from qwen_moe.tokenizer import Tokenizer, read_eos_token_ids

RECIPES = (None, "int8", "int4", "int4-all")
KV_DTYPES = ("bfloat16", "float32")
DEFAULT_CONTEXT = 4096
EMBEDDED = Path(__file__).parent / "models" / "tiny"


@dataclass(frozen=True, slots=True)
class ServingCapacity:
    """How many sessions an engine serves.

    Attributes:
        max_sessions: Sessions that may be open at once.
        bytes_per_session: Of state, with a full context.
        reason: "requested", or what made the engine fail closed to one session.
    """

    max_sessions: int
    bytes_per_session: int
    reason: str


class Engine(Closing):
    """A loaded model and the state of its sessions.

    All memory is taken when it opens. Any thread may call anything; calls are served in turn,
    between two steps. Engines that open the same checkpoint the same way share its weights.

        with Engine() as engine, engine.session() as session:
            for step in session.generate("Once upon a time", SamplingParams(max_tokens=64)):
                print(step.text, end="", flush=True)

    Attributes:
        path: The checkpoint directory or GGUF file.
        config: The model's dimensions, under the names of config.json.
        devices: Where the layers are, in order.
        quantize: None, "int8", "int4" or "int4-all".
        group: The most input features that share a scale, where a matrix is quantized.
        slots: Every tensor that the model holds: name, format and bytes.
        kv_dtype: "bfloat16" or "float32": how keys and values of attention are kept.
        max_context: Tokens that one session holds at most.
        eos_token_ids: Ids that end a reply.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        device: str = "auto",
        devices: Sequence[str] | None = None,
        split: Sequence[int] | None = None,
        quantize: str | None = None,
        group: int | None = None,
        max_sessions: int = 8,
        max_context: int | None = None,
        load_format: str = "auto",
        kv_dtype: str = "bfloat16",
        threads: int | None = None,
        progress: bool | None = None,
        poison: bool = False,
        cuda_graph: bool = True,
        prefill_kernels: bool = True,
    ) -> None:
        """Open a checkpoint and load its weights.

        Args:
            path: A local Hugging Face directory, also one that is quantized already (FP8, GPTQ,
                AWQ, compressed-tensors), a bundle of `qwen-moe quantize`, or a GGUF file; None
                opens the small model inside the package.
            device: "cpu", "cuda", "cuda:1", or "auto", which takes CUDA when there is some.
            devices: Instead of `device`: spread contiguous spans of layers over several.
            split: The first layer of every device but the first; None shares layers out evenly.
            quantize: Pack weights that are not int4 or int8 already: "int8", "int4" (large
                matrices int4, the small ones that every token passes int8), "int4-all", or None to
                keep the checkpoint's. A bundle has one recipe: None or that.
            group: Input features that share a scale in quantized matrices: 64, 128, or on CPUs 32.
                Codes that the checkpoint has in smaller groups are then packed again. None keeps
                all codes that the device takes, and packs the rest in the same groups, or 128.
            max_sessions: Sessions that may be open at once.
            max_context: Tokens that one session holds at most. None takes 4096, or what the model
                allows when that is less.
            load_format: "auto" or "safetensors" reads the checkpoint; "dummy" takes random weights
                and needs only a config.json.
            kv_dtype: How keys and values of attention are kept: "bfloat16" or "float32".
            threads: CPU threads; None takes all that the process may use.
            progress: Show a progress bar on stderr; None shows it on a terminal.
            poison: Fill freed state with NaN, so that a leak between sessions shows at once.
            cuda_graph: On CUDA, replay every decode step as one captured graph. False launches the
                same kernels one by one; same bits. Other devices ignore it.
            prefill_kernels: On CUDA, take prompts through kernels of their own, compiled by Triton
                when the package was built or when an engine first needs them. False takes them
                through the decode step, token by token. Other devices ignore it.

        Raises:
            FormatError: A file or tensor of the checkpoint is missing, broken or does not fit.
            InvalidArgument: A setting cannot work, or the model is one that this engine cannot run.
            CapacityError: The sessions do not fit in memory; the message has the numbers.
            DeviceError: The device is not there.
        """
        if quantize not in RECIPES:
            raise InvalidArgument(
                f"quantize must be None, 'int8', 'int4' or 'int4-all', got {quantize!r}"
            )
        if kv_dtype not in KV_DTYPES:
            raise InvalidArgument(
                f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}"
            )
        _positive("max_sessions", max_sessions)
        if threads is not None:
            _positive("threads", threads)
        self.path = EMBEDDED if path is None else Path(path)
        self._checkpoint = Checkpoint(self.path, load_format)
        self.config = self._checkpoint.config
        self.devices = resolve_devices(device, devices)
        recipe = self._checkpoint.recipe(quantize)
        self.quantize = None if recipe == "none" else recipe
        self.kv_dtype = kv_dtype
        self.max_context = _context(max_context, self.config.max_position_embeddings)
        self._tokenizer: Tokenizer | None = None
        self._no_tokenizer = ""
        try:
            self._tokenizer = self._checkpoint.tokenizer()
        except FormatError as error:
            if (self._checkpoint.folder / "tokenizer.json").is_file():
                raise
            self._no_tokenizer = str(error)
        self.eos_token_ids = (
            self._tokenizer.eos_token_ids
            if self._tokenizer
            else read_eos_token_ids(self._checkpoint.folder)
        )
        model = loading.load(
            self._checkpoint,
            recipe=self.recipe,
            devices=self.devices,
            split=resolve_split(split, len(self.devices), self.config.num_hidden_layers),
            threads=threads or len(os.sched_getaffinity(0)),
            group=group,
            progress=progress,
        )
        self.group = model.group
        self.slots = model.slots
        self._core: _core.Engine | None = _core.Engine(
            model,
            max_sessions=max_sessions,
            max_context=self.max_context,
            kv_dtype=kv_dtype,
            eos_token_ids=self.eos_token_ids,
            poison=poison,
            cuda_graph=cuda_graph,
            prefill_kernels=prefill_images(self.devices) if prefill_kernels else [],
        )

    def __repr__(self) -> str:
        """Path, recipe and place."""
        where = "closed" if self.closed else ", ".join(self.devices)
        return f"Engine({str(self.path)!r}, quantize={self.quantize!r}, {where})"

    @property
    def core(self) -> _core.Engine:
        """The C++ engine, for code that steps it itself.

        Raises:
            InvalidArgument: The engine is closed.
        """
        if self._core is None:
            raise InvalidArgument("the engine is closed")
        return self._core

    @property
    def closed(self) -> bool:
        """After `close`."""
        return self._core is None

    @property
    def recipe(self) -> str:
        """`quantize` by the core's name: none, int8, int4 or int4-all."""
        return self.quantize or "none"

    @property
    def dtype(self) -> str:
        """Of the checkpoint's large matrices: bfloat16, float16 or float32."""
        return self._checkpoint.dtype

    @property
    def fingerprint(self) -> str:
        """Says what the checkpoint holds; saved sessions name it."""
        return self._checkpoint.fingerprint

    @property
    def capacity(self) -> ServingCapacity:
        """How many sessions it serves, and what one takes."""
        core = self.core
        return ServingCapacity(core.max_sessions, core.bytes_per_session, core.capacity_reason)

    @property
    def memory(self) -> dict[str, int]:
        """Ledger in bytes: weights, state of sessions, KV pages, scratch, total."""
        return self.core.memory

    @property
    def stats(self) -> dict[str, int]:
        """Counters since it opened: tokens and steps of prefill and decode, sessions, pages.

        On CUDA also what the graphs of the decode steps did: captures, replays, uses of each size.
        """
        return self.core.stats

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            FormatError: It has none; prompts are then ids, and replies have no text.
        """
        if self._tokenizer is None:
            raise FormatError(
                f"{self._no_tokenizer}; without a tokenizer prompts must be token ids"
            )
        return self._tokenizer

    def session(self) -> Session:
        """Open an empty session.

        Raises:
            CapacityError: All of them are open.
        """
        return Session(self, self.core.open())

    def restore(self, path: str | Path) -> Session:
        """Open a session that `Session.save` wrote; it goes on exactly where that one was.

        Raises:
            FormatError: The file is missing, damaged, or no saved session.
            InvalidArgument: It belongs to another model, recipe or kv_dtype.
            CapacityError: No session is free, or its tokens do not fit max_context.
        """
        return Session(self, snapshot.restore(self, Path(path)))

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Reply to many prompts, in batches of as many sessions as are free.

        Args:
            prompts: One prompt or several, each a text or a list of ids.
            sampling: For all of them, or one for each.

        Returns:
            One generation for each prompt, in order. Each is what the prompt gives alone.

        Raises:
            InvalidArgument: A prompt is empty or has an id outside the vocabulary; all are checked
                before anything runs.
            CapacityError: A prompt and one token do not fit max_context, or no session is free.
        """
        return batch.generate(self, prompts, sampling)

    def close(self) -> None:
        """Give all memory back; sessions of it are closed too. Closing twice is fine."""
        self._core = None

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt, checked.

        Raises:
            InvalidArgument: It is empty, or an id is outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            try:
                ids = [operator.index(token) for token in prompt]
            except TypeError as error:
                raise InvalidArgument(f"a prompt is a text or token ids: {error}") from None
        if not ids:
            raise InvalidArgument("the prompt is empty")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.config.vocab_size:
                raise InvalidArgument(
                    f"token id {token} is outside the vocabulary of {self.config.vocab_size}"
                )
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        """Text of a reply; empty without a tokenizer."""
        return self._tokenizer.decode(ids) if self._tokenizer else ""

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        """Text of a reply, token by token; nothing without a tokenizer.

        Raises:
            FormatError: There are stop texts and no tokenizer.
        """
        if self._tokenizer is None and not stop:
            return Detokenizer(lambda token: b"")
        return self.tokenizer.detokenizer(stop)


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{name} must be a positive integer, got {value!r}")


def _context(asked: int | None, most: int) -> int:
    if asked is None:
        return min(DEFAULT_CONTEXT, most)
    _positive("max_context", asked)
    if asked > most:
        raise InvalidArgument(
            f"max_context is {asked}; the model's max_position_embeddings is {most}"
        )
    return asked
