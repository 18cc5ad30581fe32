"""Makes the tiny checkpoints of model/tests/families and what transformers computes from them.

    pip install torch transformers safetensors tokenizers
    python model/scripts/make_references.py [--out model/tests/families] [NAME ...]

Each folder is a random-weight checkpoint in the Hugging Face layout, as transformers saves it, with a small tokenizer
and `reference.safetensors`:

    input_ids  i64 [n, t]
    logits     f32 [n, t, vocab]
    greedy     i64 [n, t + g]               the input and g greedy tokens, end-of-text ignored
    routes     i64 [n, sparse layers, t, k] chosen experts, sorted

`coel eval --model DIR --reference DIR/reference.safetensors` compares. The reference is computed in float32 by a model
loaded in float32 from disk: one that was cast to BF16 keeps BF16 rotary tables and is off by 1e-2. Weights are drawn wide,
and a prompt is taken only if none of its decisions (experts of any layer, greedy tokens) is closer than TIE_MARGIN to
going the other way, so that another order of additions cannot decide otherwise.

`reference_of(DIR)` works for any checkpoint, not only these; `--model DIR` writes its reference beside its weights.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROWS, TOKENS, FOLLOW = 3, 16, 16
# Of a logit, relative to the largest one; float32 in another order of additions is off by some 1e-6.
TIE_MARGIN = 2e-3
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 320
TEXT = Path(__file__).resolve().parent.parent / "src" / "calibration.txt"

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)

# Between them: grouped and single heads, head_dim given and derived, each kind of q/k norm, biases, clipping, weights
# normalised or not, tied heads, dense layers first, last and between.
FAMILIES = {
    "mixtral": ("MixtralConfig", dict(intermediate_size=32, num_local_experts=8, rope_theta=1e6)),
    "mixtral-wide-heads": (
        "MixtralConfig",
        dict(intermediate_size=32, num_local_experts=6, head_dim=32, num_experts_per_tok=3, rope_theta=1e4,
             tie_word_embeddings=True, sliding_window=128),
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        dict(moe_intermediate_size=32, num_experts=8, intermediate_size=96, head_dim=32, norm_topk_prob=True,
             rope_theta=1e6),
    ),
    "qwen3-moe-dense-first": (
        "Qwen3MoeConfig",
        dict(moe_intermediate_size=32, num_experts=8, intermediate_size=96, head_dim=16, norm_topk_prob=False,
             num_hidden_layers=3, mlp_only_layers=[0], attention_bias=True, tie_word_embeddings=True, rope_theta=1e4),
    ),
    "qwen3-moe-step-2": (
        "Qwen3MoeConfig",
        dict(moe_intermediate_size=32, num_experts=6, intermediate_size=96, head_dim=16, norm_topk_prob=True,
             num_hidden_layers=5, decoder_sparse_step=2, num_attention_heads=2, num_key_value_heads=1,
             tie_word_embeddings=True, rope_theta=1e6),
    ),
    "olmoe": (
        "OlmoeConfig",
        dict(intermediate_size=32, num_experts=8, num_key_value_heads=4, num_experts_per_tok=3, rope_theta=1e4),
    ),
    "olmoe-clipped": (
        "OlmoeConfig",
        dict(intermediate_size=32, num_experts=8, num_key_value_heads=2, norm_topk_prob=True, clip_qkv=0.8,
             attention_bias=True, rope_theta=1e4),
    ),
    "qwen2-moe-normed": (
        "Qwen2MoeConfig",
        dict(moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts=8, norm_topk_prob=True,
             qkv_bias=False, rope_theta=1e6),
    ),
    "qwen2-moe-step-2": (
        "Qwen2MoeConfig",
        dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=8, intermediate_size=96,
             num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=False,
             tie_word_embeddings=True, rope_theta=1e4),
    ),
}


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE over the repository's own calibration text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(TEXT.read_text().splitlines(keepends=True), trainer)
    return tokenizer


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Random weights wide enough that no two choices are alike: rows keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.3 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif "embed_tokens" in name:
            # Wide ones that are also the head would make every token follow itself.
            values = values * (0.15 if model.config.tie_word_embeddings else 1.0)
        else:
            # Sharp attention and a sharp router; the rest keeps variance.
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "mlp.gate.", "lm_head")) else 1.2
            values = values * gain / math.sqrt(parameter.shape[-1])
        with torch.no_grad():
            parameter.copy_(values)


def make_checkpoint(name: str, folder: Path) -> None:
    """A checkpoint as `save_pretrained` writes it, in BF16."""
    kind, fields = FAMILIES[name]
    fields = {**COMMON, **fields}
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    config = getattr(transformers, kind)(**fields, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw_weights(model, seed=sum(map(ord, name)))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    train_tokenizer().save(str(folder / "tokenizer.json"))
    words = {"eos_token": SPECIALS[2], "pad_token": SPECIALS[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n")


class Reference:
    """A checkpoint in float32, watched while it computes."""

    def __init__(self, folder: Path):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        self.seen = []
        routers = [module for module in self.model.modules() if type(module).__name__.endswith("TopKRouter")]
        for router in routers:
            router.register_forward_hook(lambda _module, _inputs, output: self.seen.append(output))

    @torch.no_grad()
    def run(self, tokens: list[int]):
        """Logits [t, vocab], routes [sparse layers, t, k], and the closest routing decision's margin."""
        self.seen.clear()
        logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        routes, margin = [], math.inf
        for scores, _weights, chosen in self.seen:
            k = chosen.shape[-1]
            routes.append(chosen.sort(dim=-1).values)
            if k < scores.shape[-1]:
                best = scores.sort(dim=-1, descending=True).values
                gap = (best[:, k - 1] - best[:, k]).min() / scores.abs().max()
                margin = min(margin, gap.item())
        return logits, torch.stack(routes), margin

    def row(self, tokens: list[int], follow: int):
        """One row of a reference and the margin of its closest decision, or as far as the first near-tie."""
        logits, routes, margin = self.run(tokens)
        greedy, last = list(tokens), logits
        while margin >= TIE_MARGIN and len(greedy) < len(tokens) + follow:
            best = last[-1].topk(2).values
            margin = min(margin, ((best[0] - best[1]) / last[-1].abs().max()).item())
            greedy.append(int(last[-1].argmax()))
            last, _, closest = self.run(greedy)
            margin = min(margin, closest)
        return logits, routes, greedy, margin


def reference_of(folder: Path, rows: int = ROWS, tokens: int = TOKENS, follow: int = FOLLOW):
    """The tensors of a reference on random prompts without near-ties, and the margin of the closest decision."""
    reference = Reference(folder)
    vocab = reference.model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    found, margins, tried = [], [], 0
    while len(found) < rows:
        tried += 1
        if tried > 4000:
            raise SystemExit(f"{folder}: every prompt has a near-tie")
        prompt = torch.randint(len(SPECIALS), vocab, (tokens,), generator=generator).tolist()
        logits, routes, greedy, margin = reference.row(prompt, follow)
        if margin >= TIE_MARGIN and len(set(greedy[tokens:])) > follow // 3:
            found.append((prompt, logits, routes, greedy))
            margins.append(margin)
    prompts, logits, routes, greedy = zip(*found)
    tensors = {
        "input_ids": torch.tensor(prompts),
        "logits": torch.stack(logits),
        "greedy": torch.tensor(greedy),
        "routes": torch.stack(routes),
    }
    return tensors, min(margins), tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAMILIES)}; all of them by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests" / "families")
    parser.add_argument("--model", type=Path, help="only write the reference of this checkpoint, beside its weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = [arguments.model] if arguments.model else []
    for name in [] if arguments.model else arguments.names or FAMILIES:
        folder = arguments.out / name
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoint(name, folder)
        folders.append(folder)
    for folder in folders:
        tensors, margin, tried = reference_of(folder)
        save_file(tensors, folder / "reference.safetensors")
        size = sum(path.stat().st_size for path in folder.iterdir())
        largest = tensors["logits"].abs().max().item()
        print(f"{folder.name}: {size} bytes, margin {margin:.4f}, {tried} prompts tried, largest logit {largest:.2f}", flush=True)


if __name__ == "__main__":
    main()
