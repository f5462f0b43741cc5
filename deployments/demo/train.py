"""Train the bundled demo model: a byte-level BPE tokenizer and a small Llama, both on one text file.

The text is a play script in the "tiny Shakespeare" form: speeches separated by blank lines, each one a
line "SPEAKER:" followed by the words spoken. The model sees it in two forms, half of the windows each:

* plain: the script as it is, so that a completion of plain text goes on as a play;
* chat: the same speeches without the speakers' names, as alternating user and assistant turns, each closed
  by an end-of-turn token, so that a chat answer is one speech that ends by itself.

The training is bounded by wall-clock time (``--minutes``): the learning rate follows the elapsed time, and
the weights with the lowest validation loss so far are saved into ``--out`` on the way. The result is an
ordinary Hugging Face model folder.

    python deployments/demo/train.py --text PATH/TO/tinyshakespeare.txt --out deployments/demo/shakespeare
"""

# mypy: disallow-untyped-calls=False
from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

VOCAB_SIZE = 1024  # special tokens included
BOS, PAD, END = "<|begin|>", "<|pad|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BOS, PAD, SYSTEM, USER, ASSISTANT, END]

# Words with the space before them, short runs of digits, punctuation, line breaks and other white space.
# Line breaks stand alone so that a prompt may end before one ("ROMEO:") and still be ordinary text.
SPLIT_PATTERN = (
    r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Only the roles system, user and assistant are supported.') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

SYSTEM_PROMPTS = [
    "You are {}.",
    "Speak as {}.",
    "You are {}. Answer in the manner of a play.",
    "You are a player.",
]

MAX_POSITIONS = 2048
WINDOW = 256  # tokens in one training window
BATCH = 4  # windows in one step


@dataclass(frozen=True)
class Speech:
    """One speech of the script: who speaks, and the words as token ids."""

    speaker: str
    ids: list[int]


@dataclass(frozen=True)
class Corpus:
    """One part of the text, in the two forms that windows are drawn from."""

    n_bytes: int
    plain: list[int]
    line_starts: list[int]  # where in `plain` a line begins
    speeches: list[Speech]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that encodes any UTF-8 text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model, with residual projections scaled down by depth."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * config.num_hidden_layers) ** -0.5)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def add_dropout(model: LlamaForCausalLM, p: float) -> None:
    """Drop activations after the embedding and after each attention and MLP block, while training.

    Llama has no such dropout of its own; hooks add it without a trace in the saved weights.
    """

    def drop(module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], p, module.training), *output[1:])
        return F.dropout(output, p, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def load_corpus(text: str, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    """Encode one part of the text as a plain stream and as a list of speeches."""

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    plain = encode(text)
    newline_ids = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
    line_starts = [0] + [i + 1 for i, token in enumerate(plain) if token in newline_ids]
    speeches = []
    for block in text.split("\n\n"):
        head, _, words = block.strip().partition("\n")
        if head.endswith(":") and words:
            speeches.append(Speech(head[:-1], encode(words)))
    return Corpus(len(text.encode()), plain, line_starts, speeches)


class Sampler:
    """Draws training batches: half plain windows, half chat windows."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.rng = rng
        self.ids: dict[str, int] = {token: tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS}

    def plain_window(self, length: int) -> list[int]:
        """BOS, then the script from the beginning of a line on."""
        corpus = self.corpus
        start = min(self.rng.choice(corpus.line_starts), len(corpus.plain) - length)
        return [self.ids[BOS], *corpus.plain[start : start + length]][:length]

    def chat_window(self, length: int) -> list[int]:
        """BOS, sometimes a system turn, then consecutive speeches as alternating turns."""
        speeches = self.corpus.speeches
        index = self.rng.randrange(len(speeches))
        window = [self.ids[BOS]]
        if self.rng.random() < 0.25:
            speaker = speeches[(index + 1) % len(speeches)].speaker
            prompt = self.rng.choice(SYSTEM_PROMPTS).format(speaker)
            prompt_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            window += [self.ids[SYSTEM], *prompt_ids, self.ids[END]]
        role = USER
        while len(window) < length:
            window += [self.ids[role], *speeches[index % len(speeches)].ids, self.ids[END]]
            role = ASSISTANT if role == USER else USER
            index += 1
        return window[:length]

    def positions(self, length: int) -> list[int]:
        """Positions of one window, in a quarter of the windows with a gap somewhere.

        The gap lets the rotary embedding meet distances up to MAX_POSITIONS in windows that are far shorter.
        """
        positions = list(range(length))
        if self.rng.random() < 0.25:
            split = self.rng.randrange(1, length)
            gap = self.rng.randrange(MAX_POSITIONS - length + 1)
            positions[split:] = [p + gap for p in positions[split:]]
        return positions

    def batch(self) -> tuple[Tensor, Tensor]:
        """Token ids of shape (BATCH, WINDOW + 1) and positions of shape (BATCH, WINDOW)."""
        windows = [(self.plain_window, self.chat_window)[i % 2](WINDOW + 1) for i in range(BATCH)]
        return torch.tensor(windows), torch.tensor([self.positions(WINDOW) for _ in windows])


def token_losses(model: LlamaForCausalLM, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Loss of each token after the first, in nats, of shape (windows, length - 1)."""
    inputs = ids[:, :-1]
    # Without an explicit mask, transformers takes a gap in the positions for a border between sequences.
    logits = model(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), position_ids=positions, use_cache=False
    ).logits
    return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, corpus: Corpus, bos: int, window: int = WINDOW, max_windows: int | None = None
) -> tuple[float, float]:
    """Loss on the plain text in nats per token and per byte, in separate windows that begin with BOS."""
    was_training = model.training
    model.eval()
    starts = range(0, len(corpus.plain) - window + 1, window)
    windows = [[bos, *corpus.plain[i : i + window]] for i in starts]
    if max_windows is not None:
        windows = windows[:: max(1, len(windows) // max_windows)]
    total, count = 0.0, 0
    for i in range(0, len(windows), 8):
        losses = token_losses(model, torch.tensor(windows[i : i + 8]))
        total += losses.sum().item()
        count += losses.numel()
    model.train(was_training)
    per_token = total / count
    return per_token, per_token * len(corpus.plain) / corpus.n_bytes


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder, with the weights in bfloat16; the model in memory stays as it is."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_optimizer(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def make_schedule(peak: float, warm_up: float = 0.03, floor: float = 0.01) -> Callable[[float], float]:
    """Learning rate by the elapsed share of the time: warm-up, then a cosine down to the floor."""

    def rate(share: float) -> float:
        if share < warm_up:
            return peak * (share + 0.001) / (warm_up + 0.001)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warm_up) / (1 - warm_up))))
        return peak * (floor + (1 - floor) * cosine)

    return rate


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], length: int) -> str:
    """Continue the ids with the model's own sampling defaults."""
    generator: Any = model  # the type stubs of transformers do not see `generate` on this class
    output = generator.generate(torch.tensor([ids]), max_new_tokens=length)
    return str(tokenizer.decode(output[0][len(ids) :], skip_special_tokens=True))


def report(out: Path, parts: dict[str, Corpus]) -> None:
    """Load the saved folder afresh and print its losses and two samples."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    bos = int(model.config.bos_token_id)
    for name, corpus in parts.items():
        for window in (WINDOW,) if name == "train" else (WINDOW, 4 * WINDOW, MAX_POSITIONS - 1):
            per_token, per_byte = evaluate(model, corpus, bos, window, max_windows=40_000 // window)
            losses = f"{per_token:.4f} nats/token, {per_byte:.4f} nats/byte"
            print(f"final, {name} in windows of {window} tokens: {losses}")
    prompt = "ROMEO:\n"
    print("--- completion\n" + prompt + sample(model, tokenizer, tokenizer(prompt)["input_ids"], 160))
    messages = [{"role": "user", "content": "Good morrow, friend. What news from the court?"}]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    print("--- chat\n" + messages[0]["content"] + "\n>> " + sample(model, tokenizer, ids, 200))


def main() -> None:
    """Train, save the best weights on the way, and report."""
    parser = argparse.ArgumentParser(description="Train the demo tokenizer and model.")
    parser.add_argument("--text", type=Path, required=True, help="the play script, UTF-8 text")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", help="the model folder")
    parser.add_argument("--minutes", type=float, default=25.0, help="wall-clock time of the training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.0, help="for runs of many epochs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--held-out", type=float, default=0.08, help="share of the text kept for validation")
    parser.add_argument("--eval-seconds", type=float, default=120.0, help="time between two evaluations")
    args = parser.parse_args()

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    text = args.text.read_text(encoding="utf-8")
    # The border lies between two speeches, so that neither part begins in the middle of one.
    border = text.index("\n\n", int(len(text) * (1 - args.held_out))) + 2
    tokenizer = train_tokenizer(text[:border])
    train, held_out = load_corpus(text[:border], tokenizer), load_corpus(text[border:], tokenizer)
    sampler = Sampler(train, tokenizer, rng)
    bos = sampler.ids[BOS]
    model = build_model(tokenizer)
    if args.dropout:
        add_dropout(model, args.dropout)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"train {len(train.plain):,} tokens, {train.n_bytes:,} bytes; "
        f"validation {len(held_out.plain):,} tokens, {held_out.n_bytes:,} bytes",
        flush=True,
    )

    optimizer = make_optimizer(model, args.weight_decay)
    rate = make_schedule(args.lr)
    began = time.monotonic()
    seconds = args.minutes * 60
    next_eval = args.eval_seconds
    best = math.inf
    step = 0
    model.train()
    while True:
        elapsed = time.monotonic() - began
        if elapsed >= next_eval or elapsed >= seconds:
            train_token, train_byte = evaluate(model, train, bos, max_windows=24)
            val_token, val_byte = evaluate(model, held_out, bos, max_windows=48)
            if val_byte < best:
                best = val_byte
                save(model, tokenizer, args.out)
            print(
                f"{elapsed:6.0f} s  step {step:5d}  {step * BATCH * WINDOW / elapsed:5.0f} tokens/s  "
                f"train {train_token:.3f} nats/token {train_byte:.3f} nats/byte  "
                f"validation {val_token:.3f} nats/token {val_byte:.3f} nats/byte (best {best:.3f})",
                flush=True,
            )
            next_eval = time.monotonic() - began + args.eval_seconds
        if elapsed >= seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(elapsed / seconds)
        ids, positions = sampler.batch()
        loss = token_losses(model, ids, positions).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    report(args.out, {"train": train, "validation": held_out})


if __name__ == "__main__":
    main()
