"""The C++ core. Raw names; `qwen_moe.engine` holds the human ones.

Every call that computes, loads or waits releases the GIL. A `session` is the integer that
`Engine.open` returned; it goes stale with `close` and is never given out again.
"""

from collections.abc import Mapping, Sequence
from typing import final

from typing_extensions import Buffer

__version__: str

def cuda_available() -> bool: ...
def cuda_device_info(device: int) -> dict[str, str]:
    """Facts of a GPU for reports: its `name`, and what else tells two machines apart. DeviceError
    when it is not there."""

def cuda_read_bandwidth(device: int) -> float:
    """Bytes per second of a plain read of the GPU's memory: the ceiling of decode."""

def isa() -> str:
    """The instruction set that the CPU kernels use: portable, avx2 or avx512."""

def cuda_pinned_bytes() -> int:
    """Host memory that is pinned for GPUs now."""

def cuda_loading_times() -> dict[str, float]:
    """Seconds that loading onto GPUs took since the process began, summed over threads: "making"
    pinned buffers and streams, "filling" them (reading files), and "waiting" for the device."""

def crc32(data: Buffer, before: int = 0) -> int:
    """As `zlib.crc32`, faster."""

def crc32_combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of two runs of bytes one after the other, from those of both."""

def read_bandwidth(threads: int, megabytes: int = 512, seconds: float = 0.3) -> float:
    """Bytes per second of a plain read of memory by `threads` threads: the ceiling of decode."""

@final
class ModelConfig:
    """Fields of config.json's text_config. Raises InvalidArgument naming a field it cannot run."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        layer_types: Sequence[str],
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rope_theta: float,
        partial_rotary_factor: float,
        linear_num_key_heads: int,
        linear_num_value_heads: int,
        linear_key_head_dim: int,
        linear_value_head_dim: int,
        linear_conv_kernel_dim: int,
        num_experts: int,
        num_experts_per_tok: int,
        moe_intermediate_size: int,
        shared_expert_intermediate_size: int,
        rms_norm_eps: float,
        tie_word_embeddings: bool,
        max_position_embeddings: int,
    ) -> None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def layer_types(self) -> list[str]: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def partial_rotary_factor(self) -> float: ...
    @property
    def linear_num_key_heads(self) -> int: ...
    @property
    def linear_num_value_heads(self) -> int: ...
    @property
    def linear_key_head_dim(self) -> int: ...
    @property
    def linear_value_head_dim(self) -> int: ...
    @property
    def linear_conv_kernel_dim(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def shared_expert_intermediate_size(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def hash(self) -> str:
        """16 hex digits over every field."""

@final
class TensorSlot:
    """One tensor that the model needs."""

    @property
    def fqn(self) -> str:
        """Name without prefix, e.g. `layers.0.linear_attn.in_proj_qkv.weight`."""
    @property
    def shape(self) -> list[int]:
        """Shape in the checkpoint, e.g. [num_experts, 2 * moe_intermediate_size, hidden_size]."""
    @property
    def format(self) -> str:
        """f32, f16, bf16, int8 or int4: how it stays resident."""
    @property
    def group(self) -> int:
        """Input features per scale; 0 when dense."""
    @property
    def bytes(self) -> int: ...
    @property
    def unit_bytes(self) -> int:
        """What `bytes` divides into: an expert, 16 output features, or all of a vector."""
    @property
    def device(self) -> str: ...
    @property
    def resident(self) -> bool:
        """Already complete in the process-wide store, put there for another engine."""

def plan(
    config: ModelConfig,
    recipe: str,
    dtype: str,
    *,
    stored: Mapping[str, str] = ...,
    group: int = 128,
) -> list[TensorSlot]:
    """What a model of this config would hold, without allocating anything.

    `stored` names matrices that the checkpoint holds as "int4" or "int8": they stay that, whatever
    the recipe, except the embedding and the small matrices that every recipe keeps exact. `group`
    is the most input features that share a scale, in every quantized matrix of the model.
    """

def session_bytes(config: ModelConfig, kv_dtype: str) -> tuple[int, int]:
    """(bytes of one session at any length, bytes more per token of context)."""

def state_buffers(config: ModelConfig, kv_dtype: str) -> list[tuple[str, str, list[int], str]]:
    """The mutable buffers of a session: name, dtype, shape, and "fixed" or "per_token" (the shape
    is then that of one token)."""

@final
class Packer:
    """Packs tensors as a CPU holds them; a GPU quantizes for it, with the same bits."""

    def __init__(self, *, threads: int, device: str = "cpu") -> None: ...

@final
class PackedTensor:
    """One tensor packed for a file. As a buffer it gives its bytes; BufferError while entries are
    missing. Several threads may put entries at once."""

    def __init__(self, slot: TensorSlot, packer: Packer) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def put(self, data: Buffer, dtype: str, first: int = 0) -> None:
        """As `Model.put`."""
    def read(self, parts: Sequence[tuple[int, int, int]], dtype: str, first: int = 0) -> None:
        """As `Model.read`."""
    def fill_random(self, seed: int) -> None:
        """As `Model.fill_random`."""

@final
class Model:
    """The weights: one copy of a tensor in the process, shared by whoever asks for the same.

    `checkpoint` identifies the source (path, size, mtime or a hash); `dtype` is the checkpoint's
    ("bfloat16", "float16", "float32"); `devices` and `split` place contiguous spans of layers:
    split holds the first layer of every device but the first. `stored` and `group` as in `plan`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        recipe: str,
        dtype: str,
        checkpoint: str,
        devices: Sequence[str],
        split: Sequence[int],
        threads: int,
        stored: Mapping[str, str] = ...,
        group: int = 128,
    ) -> None: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def recipe(self) -> str: ...
    @property
    def slots(self) -> list[TensorSlot]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def group(self) -> int: ...
    def put(self, fqn: str, data: Buffer, dtype: str, first: int = 0) -> None:
        """Packs rows of one tensor. `data` is contiguous, of `dtype`, and holds whole entries of
        the leading dimension starting at `first` (for experts: expert `first`, first + 1, ...).
        Of dtype "coded" every weight is an int16 code and the f16 scale of its group; a quantized
        tensor then keeps both as they are."""
    def read(
        self, fqn: str, parts: Sequence[tuple[int, int, int]], dtype: str, first: int = 0
    ) -> None:
        """As `put`, of data that lies in open files: descriptor, offset and size of each run of
        bytes, one after the other. Several threads may read, one file and one tensor too."""
    def read_packed(self, fqn: str, file: int, offset: int, bytes: int, at: int = 0) -> int:
        """Read whole units of a tensor, from its byte `at`, as `PackedTensor` gives them; a GPU
        puts them in its own order. They lie at `offset` of an open file. Gives their CRC-32.
        Several threads may read, one tensor too; it is complete after `accept`."""
    def accept(self, fqn: str) -> None:
        """What was read of a tensor is right."""
    def fill_random(self, fqn: str, seed: int) -> None: ...
    def finish(self) -> None:
        """Every tensor is complete, or FormatError naming the first that is not."""

@final
class Sampling:
    """What the sampler reads. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.
    logprobs: -1 none, 0 of the chosen token, n also of the n likeliest."""

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        logprobs: int = -1,
    ) -> None: ...

@final
class Progress:
    """What a session's request produced since the last poll."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[float]:
        """One for each token; empty when not asked for."""
    @property
    def top_logprobs(self) -> list[list[tuple[int, float]]]: ...
    @property
    def finished(self) -> bool:
        """No request is running any more."""
    @property
    def finish_reason(self) -> str:
        """ "" while running, else stop, length, stopped, or error."""
    @property
    def error(self) -> str: ...

@final
class KernelImage:
    """A kernel that was compiled ahead of time: the fields of kernels.images.Image."""

    def __init__(
        self,
        *,
        name: str,
        symbol: str,
        code: bytes,
        shared: int,
        warps: int,
        params: Sequence[tuple[str, str]],
        constants: Sequence[tuple[str, int]],
        scratch: int,
        overlaps: bool,
    ) -> None: ...
    @property
    def name(self) -> str: ...

@final
class Engine:
    """Sessions over one Model. Calls from several threads are served in turn, between steps."""

    def __init__(
        self,
        model: Model,
        *,
        max_sessions: int,
        max_context: int,
        kv_dtype: str,
        eos_token_ids: Sequence[int],
        poison: bool = False,
        cuda_graph: bool = True,
        prefill_kernels: Sequence[KernelImage] = ...,
    ) -> None:
        """Allocates all state at once. CapacityError with the numbers when it cannot fit. `poison`
        fills freed state with NaN, so that a leak between sessions shows at once. `cuda_graph`
        False launches the same kernels one by one. CUDA takes prompts through `prefill_kernels`,
        and without any through the decode step."""
    @property
    def max_sessions(self) -> int: ...
    @property
    def max_context(self) -> int: ...
    @property
    def bytes_per_session(self) -> int:
        """At max_context."""
    @property
    def capacity_reason(self) -> str:
        """Why max_sessions is what it is: "requested", or what made it fail closed to 1."""
    @property
    def memory(self) -> dict[str, int]:
        """Ledger in bytes: weights, session state, kv pages, scratch, total."""
    @property
    def stats(self) -> dict[str, int]:
        """Counters: sessions_open, prefill_tokens, prefill_steps, decode_tokens, decode_steps,
        max_decode_rows, pages_used, pages_total, slots_used; on CUDA also what its graphs did."""
    def open(self) -> int: ...
    def close(self, session: int) -> None: ...
    def reset(self, session: int) -> None: ...
    def fork(self, session: int) -> int: ...
    def stop(self, session: int) -> None:
        """Ends the running request at the next token boundary. Never waits."""
    def cancel(self, session: int) -> None:
        """Drops the running request now, between two steps."""
    def submit(
        self,
        session: int,
        tokens: Sequence[int],
        *,
        sampling: Sampling | None,
        max_tokens: int,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
    ) -> None:
        """Appends `tokens`, then draws up to `max_tokens` (0: prefill only). Errors leave the
        session as it was: unknown ids, a prompt over max_context, a running request, poison."""
    def run(self, sessions: Sequence[int], *, tokens: int = 0, any: bool = False) -> None:
        """Steps the engine until all of `sessions` (or with `any`, one of them) have no request
        running, or hold at least `tokens` (> 0) tokens not yet polled. Steps serve every session
        with work. On CUDA the engine is one step ahead of the tokens that it knows. Raises
        KeyboardInterrupt within one step of Ctrl-C; requests then stay where they are."""
    def poll(self, session: int) -> Progress: ...
    def position(self, session: int) -> int:
        """Tokens in the timeline: where the next one goes."""
    def tokens(self, session: int) -> list[int]: ...
    def poisoned(self, session: int) -> str:
        """The error that poisoned the session until reset, or ""."""
    def logits(self, session: int, out: Buffer) -> None:
        """Writes float32 [vocab_size] of the last position computed, or InvalidArgument. Waits
        until it is computed."""
    def export_state(self, session: int) -> list[tuple[str, str, list[int], bytearray]]:
        """(fqn, dtype, shape, bytes) of every mutable buffer, per-token ones cut to what is
        computed, and the timeline itself as `tokens` and `marks` (int32)."""
    def import_state(
        self, session: int, buffers: Sequence[tuple[str, str, Sequence[int], Buffer]]
    ) -> None:
        """Into a freshly opened session. FormatError names the buffer that does not fit."""
