r"""Make the tiny embedded checkpoint: corpus, tokenizer, training, export.

Needs torch, transformers (5.17 or newer), tokenizers, safetensors and numpy; training wants one
data-centre GPU.

    # 1. fetch the packages listed in tiny_corpus.SOURCES into packages/, then:
    python tools/train_tiny.py corpus --packages packages --out data
    # 2. seven minutes on one H200; the second run goes on from the first and learns to leave loops:
    python tools/train_tiny.py train --data data --out out1 --dropout 0.2 --seconds 200
    python tools/train_tiny.py train --data data --out out --resume out1 --lr 8e-4 --dropout 0.2 \
        --loops 0.5 --seed 2 --seconds 230
    # 3. the checkpoint, in bf16 (without --weights: randomly initialised):
    python tools/train_tiny.py export --data data --weights out --out python/qwen_moe/models/tiny
    python tools/train_tiny.py sample --model python/qwen_moe/models/tiny

`corpus` and `export` need no GPU. `train` ends by itself after `--seconds` (counted from its
start, compilation included), with the learning rate following a cosine over that time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 4096
CONTEXT = 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXTRA = tuple(f"<{end}{t}>" for t in ("tool_call", "tool_response", "think") for end in ("", "/"))
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content or [] %}{{- part.text }}{%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
PROMPTS = (
    "It was a dark night, and",
    "The old man looked at the sea and said,",
    "The president of the United States",
    "In the beginning",
    "She had never been so happy",
)
CHATS = ("Hello!", "Who are you?", "Tell me a story about a king.", "What does river mean?")


def train_tokenizer(texts: list[str]) -> Any:
    """Train the byte-level BPE; the special tokens come last, as in the large models."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL) - len(EXTRA),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in EXTRA])
    return tokenizer


def make_corpus(args: argparse.Namespace) -> None:
    """Build the texts, the tokenizer and the token arrays."""
    import tiny_corpus

    args.out.mkdir(parents=True, exist_ok=True)
    train, val, table = tiny_corpus.build(args.packages)
    for row in table:
        print(f"{row['bytes']:>10}  {row['package']} {row['version']}: {row['title']}")
    tokenizer = train_tokenizer([t for t in train if not t.startswith("<|im_start|>")])
    tokenizer.save(str(args.out / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    sizes = {}
    for part, texts in (("train", train), ("val", val)):
        ids = [i for e in tokenizer.encode_batch(texts) for i in (*e.ids, end)]
        np.save(args.out / f"{part}.npy", np.array(ids, dtype=np.uint16))
        sizes[part] = {"documents": len(texts), "tokens": len(ids)}
    print(sizes, "vocabulary", tokenizer.get_vocab_size())
    (args.out / "sources.json").write_text(json.dumps({"sources": table, "sizes": sizes}, indent=1))


def make_model() -> nn.Module:
    """Build the randomly initialised model of the embedded checkpoint."""
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    first = VOCAB - len(SPECIAL) - len(EXTRA)
    config = Qwen3_5MoeTextConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        attn_output_gate=True,
        full_attention_interval=4,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        mamba_ssm_dtype="float32",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        router_aux_loss_coef=0.001,
        max_position_embeddings=4096,
        partial_rotary_factor=0.25,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=first,
        eos_token_id=first + SPECIAL.index("<|im_end|>"),
        pad_token_id=first,
    )
    torch.manual_seed(0)
    model = Qwen3_5MoeForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # router rows must differ from the start
            if name.endswith("mlp.gate.weight"):
                nn.init.normal_(weight, std=0.02)
    return model


def moe_forward(self: nn.Module, hidden: Tensor) -> Tensor:
    """Sparse block as two dense products: every expert runs, unchosen ones are weighted zero.

    Same function as the model's own, without index gathering; keeps the load-balancing loss of
    this layer in `self.aux_loss`.
    """
    x = hidden.reshape(-1, hidden.shape[-1])
    probs = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
    top, index = probs.topk(self.gate.top_k, dim=-1)
    weight = torch.zeros_like(probs).scatter(1, index, top / top.sum(-1, keepdim=True))
    experts, n = self.experts, self.gate.num_experts
    load = (weight > 0).float().mean(0) / self.gate.top_k
    self.aux_loss = n * (load * probs.mean(0)).sum()
    gate, up = F.linear(x, experts.gate_up_proj.flatten(0, 1)).view(len(x), n, 2, -1).unbind(2)
    inner = (F.silu(gate) * up * weight.to(gate.dtype)[..., None]).flatten(1)
    out = F.linear(inner, experts.down_proj.transpose(0, 1).flatten(1))
    shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
    return (out + shared).view_as(hidden)


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """Causal depthwise convolution as shifted products (for training: no state)."""
    size, length = weight.shape[-1], x.shape[-1]
    padded = F.pad(x, (size - 1, 0))
    out = sum(weight[:, i, None].to(x.dtype) * padded[..., i : i + length] for i in range(size))
    return F.silu(out)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Gated delta rule in chunks, in float32: the model's reference without its long loops."""
    chunk, repeat = 64, v.shape[2] // q.shape[2]
    with torch.autocast(v.device.type, enabled=False):
        parts = (t.float().transpose(1, 2).unflatten(2, (-1, chunk)) for t in (q, k, v, g, beta))
        qs, ks, vs, gs, betas = parts
        qs, ks = (t.repeat_interleave(repeat, dim=1) if repeat > 1 else t for t in (qs, ks))
        qs, ks = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (qs, ks))
        qs = qs * qs.shape[-1] ** -0.5
        total = gs.cumsum(-1)
        above = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).triu(1)
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(above, -torch.inf).exp()
        kb, growth = ks * betas[..., None], total.exp()[..., None]
        lower, eye = (kb @ ks.mT) * decay, torch.eye(chunk, device=v.device).expand_as(decay)
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        u, w = inverse @ (vs * betas[..., None]), inverse @ (kb * growth)
        local, reach = (qs @ ks.mT) * decay, qs * growth
        left, last = ks * (total[..., -1:] - total).exp()[..., None], growth[..., -1:, :]
        state, out = torch.zeros_like(ks[:, :, 0].mT @ vs[:, :, 0]), []
        for i in range(qs.shape[2]):
            fresh = u[:, :, i] - w[:, :, i] @ state
            out.append(reach[:, :, i] @ state + local[:, :, i] @ fresh)
            state = state * last[:, :, i] + left[:, :, i].mT @ fresh
        return torch.stack(out, dim=2).flatten(2, 3).transpose(1, 2).to(v.dtype), None


def prepare(model: nn.Module, dropout: float, compiled: bool) -> None:
    """Swap in the training forms of the model's parts, add dropout, and compile the layers."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as code

    code.Qwen3_5MoeSparseMoeBlock.forward = moe_forward
    code.causal_conv1d_fn = conv_forward
    code.torch_chunk_gated_delta_rule = delta_rule

    def drop(module: nn.Module, _: Any, out: Tensor) -> Tensor:
        return F.dropout(out, dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        linear = hasattr(layer, "linear_attn")
        mixed = layer.linear_attn.out_proj if linear else layer.self_attn.o_proj
        mixed.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile()


def stutter(row: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Repeat a few short spans of a row; return it with the mask of the repeated tokens.

    The loss skips the copies and counts what follows them: the model learns to leave a loop,
    where a small model that decodes greedily would stay in it.
    """
    parts, masks, done = [], [], 0
    for end in np.sort(rng.integers(48, len(row), size=10)):
        span = row[end - int(np.exp(rng.uniform(np.log(2), np.log(40)))) : end]
        copies = int(rng.integers(1, 3))
        parts += [row[done:end], *[span] * copies]
        masks += [np.zeros(end - done, bool), np.ones(len(span) * copies, bool)]
        done = end
    tokens, mask = np.concatenate([*parts, row[done:]]), np.concatenate(masks)
    mask = np.pad(mask, (0, len(tokens) - len(mask)))
    return tokens[: len(row)], mask[: len(row)]


def batches(
    ids: np.ndarray, size: int, device: torch.device, seed: int, loops: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows of CONTEXT tokens and their labels; each epoch covers the text once."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            start = int(rng.integers(0, CONTEXT)) if len(ids) > 8 * CONTEXT else 0
            starts = np.arange(start, len(ids) - CONTEXT - 1, CONTEXT)
            queue += rng.permutation(starts).tolist()
        take, queue = queue[:size], queue[size:]
        rows = np.stack([ids[s : s + CONTEXT + 1] for s in take]).astype(np.int64)
        labels = rows.copy()
        for i in range(int(loops * size)):
            rows[i], mask = stutter(rows[i], rng)
            labels[i] = np.where(mask, -100, rows[i])
        both = (torch.from_numpy(x).to(device) for x in (rows[:, :-1], labels[:, 1:].copy()))
        yield tuple(both)


def loss_of(
    model: nn.Module, batch: tuple[Tensor, Tensor], head_loss: Callable
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of a batch and the mean load-balancing loss of the layers."""
    hidden = model.model(input_ids=batch[0], use_cache=False).last_hidden_state
    loss = head_loss(hidden.flatten(0, 1), model.lm_head.weight, batch[1].flatten())
    return loss, torch.stack([layer.mlp.aux_loss for layer in model.model.layers]).mean()


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Next-token loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def save_weights(state: dict[str, Tensor], out: Path, report: dict[str, Any]) -> None:
    """Save float32 weights in three shards, each small enough to move about, and a report."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    total, shards = sum(t.numel() for t in state.values()), [{}, {}, {}]
    done = 0
    for name, tensor in state.items():
        shards[min(2, done * 3 // total)][name] = tensor.float().cpu().contiguous()
        done += tensor.numel()
    for i, shard in enumerate(shards):
        save_file(shard, out / f"weights-{i}.safetensors")
    (out / "report.json").write_text(json.dumps(report, indent=1))


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Join the shards of `save_weights`."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def train(args: argparse.Namespace) -> None:
    """Train for a given time; keep and save the weights of the lowest validation loss."""
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    torch.set_float32_matmul_precision("high")
    model = make_model()
    if args.resume:
        model.load_state_dict(load_weights(args.resume), strict=False)
    model.to(device).train()
    ids = {part: np.load(args.data / f"{part}.npy") for part in ("train", "val")}
    print("tokens", {k: len(v) for k, v in ids.items()}, flush=True)
    compiled = gpu and not args.eager
    head_loss = torch.compile(cross_entropy) if compiled else cross_entropy
    decay = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=gpu)
    feed = batches(ids["train"], args.batch, device, args.seed, args.loops)
    prepare(model, args.dropout, compiled)
    fixed = batches(ids["val"], args.batch, device, seed=0)
    val_rows = [next(fixed) for _ in range(len(ids["val"]) // CONTEXT // args.batch + 1)]

    def cast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=gpu)

    def validate() -> float:
        model.eval()
        with torch.no_grad(), cast():
            losses = [loss_of(model, r, head_loss)[0].item() for r in val_rows]
        model.train()
        return sum(losses) / len(losses)

    best: tuple[float, dict[str, Tensor]] = (math.inf, {})
    history: list[dict[str, float]] = []
    step, mean, begun, begun_step, next_check = 0, Tensor(), 0.0, 0, 60.0
    while True:
        elapsed = time.monotonic() - start
        progress = (elapsed - begun) / (args.seconds - begun) if begun else 0.0
        last = progress >= 1 or step == args.steps
        if last or (begun and elapsed > next_check):
            val = validate()
            rate = (step - begun_step) * args.batch * CONTEXT / max(elapsed - begun, 1e-9)
            row = {"seconds": elapsed, "step": step, "train": mean.item(), "val": val, "rate": rate}
            history.append(row)
            print({k: round(v, 4) for k, v in row.items()}, flush=True)
            if val < best[0] + 0.01 * last:  # about as good: rather the last, at the low rate
                named = model.named_parameters()  # a tied head is listed once
                best = (val, {k: p.detach().cpu().clone() for k, p in named})
            next_check = elapsed + 30
        if last:
            break
        warm_up = min(1.0, (step + 1) / 200)
        floor = args.lr / 20
        lr = warm_up * (floor + (args.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with cast():
            loss, aux = loss_of(model, next(feed), head_loss)
        (loss + args.aux * aux).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        mean = loss.detach() if step == 1 else mean.lerp(loss.detach(), 0.01)
        if step % 100 == 0 or step <= 3:
            print(f"{step} loss {loss.item():.4f} aux {aux.item():.3f}", flush=True)
        if step == min(20, args.steps - 1):  # compiled and tuned by now: the clock starts
            if gpu:
                torch.cuda.synchronize()
            begun, begun_step = time.monotonic() - start, step
            print(f"warm after {begun:.0f} s", flush=True)
    report = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "steps": step,
        "tokens": step * args.batch * CONTEXT,
        "batch": args.batch,
        "lr": args.lr,
        "best_val": best[0],
        "history": history,
    }
    save_weights(best[1], args.out, report)


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint folder: bf16 weights, configuration, tokenizer, chat template."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    model = make_model()
    if args.weights:
        missing, extra = model.load_state_dict(load_weights(args.weights), strict=False)
        if set(missing) - {"lm_head.weight"} or extra:
            raise ValueError(f"weights do not fit: missing {missing}, unexpected {extra}")
    model = model.to(torch.bfloat16)
    first = VOCAB - len(SPECIAL) - len(EXTRA)
    model.generation_config = GenerationConfig(
        bos_token_id=first,
        pad_token_id=first,
        eos_token_id=[first + SPECIAL.index("<|im_end|>"), first],
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
    )
    model.save_pretrained(args.out, save_original_format=False)  # experts stay fused
    (args.out / "model.safetensors").chmod(0o644)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.data / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(args.out)
    print(sum(p.numel() for p in model.parameters()), "parameters")


def sample(args: argparse.Namespace) -> None:
    """Print greedy continuations of a few prompts and chats, in float32 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for prompt in (*PROMPTS, *CHATS):
        text = prompt
        if prompt in CHATS:
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=args.tokens, do_sample=False)
        print(f"--- {prompt}\n{tokenizer.decode(out[0, ids.shape[1] :])}\n", flush=True)


def main() -> None:
    """Read the command line and run the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable, **paths: bool) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        for path, required in paths.items():
            sub.add_argument(f"--{path}", type=Path, required=required)
        sub.set_defaults(run=run)
        return sub

    command("corpus", make_corpus, packages=True, out=True)
    sub = command("train", train, data=True, out=True, resume=False)
    sub.add_argument("--seconds", type=float, default=560)
    sub.add_argument("--steps", type=int, default=1_000_000)
    sub.add_argument("--batch", type=int, default=64)
    sub.add_argument("--lr", type=float, default=2e-3)
    sub.add_argument("--aux", type=float, default=0.01)
    sub.add_argument("--dropout", type=float, default=0.1)
    sub.add_argument("--loops", type=float, default=0.0, help="share of rows with copied spans")
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--eager", action="store_true", help="do not compile")
    command("export", export, data=True, out=True, weights=False)
    sub = command("sample", sample, model=True)
    sub.add_argument("--tokens", type=int, default=60)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
