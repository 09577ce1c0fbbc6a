"""Train the model that ships with the package, from the text to a checkpoint.

    python bench/train_demo.py prepare DATA --docs cpython/Doc [--stdlib FOLDER ...]
    python bench/train_demo.py baselines DATA
    python bench/train_demo.py train DATA HF_DIR [--set epochs=12 ...]
    python bench/train_demo.py evaluate DATA HF_DIR [--transformers]

Only ``train`` wants a GPU. What comes out is converted and quantized like any other checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from demo_model import corpus, ngram, tokens
from demo_model.shape import Shape

if TYPE_CHECKING:
    from demo_model.judging import Logits

_SAMPLE_TOKENS = 120


def main() -> int:
    """Run one of the commands; returns the exit status."""
    options = _parser().parse_args()
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the model that ships with the package.")
    commands = parser.add_subparsers(required=True)
    for name, run in (
        ("prepare", _prepare),
        ("baselines", _baselines),
        ("train", _train),
        ("evaluate", _evaluate),
    ):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("data", type=Path, help="folder of the token files")
        if run is _prepare:
            here = Path(sysconfig.get_path("stdlib"))
            command.add_argument("--docs", type=Path, required=True, help="reST sources")
            command.add_argument("--stdlib", type=Path, nargs="+", default=[here])
            command.add_argument("--vocab", type=int, default=Shape.vocab_size)
        elif run is not _baselines:
            command.add_argument("checkpoint", type=Path, help="Hugging Face folder")
            command.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
            command.add_argument("--transformers", action="store_true", help="compare with it")
    return parser


def _prepare(options: argparse.Namespace) -> None:
    """Collect the text, train the tokenizer, write the token files."""
    documents = corpus.collect(options.stdlib, options.docs)
    meta = tokens.prepare(documents, options.vocab, options.data)
    n_train, n_held = len(tokens.load(options.data).train), sum(meta.held_bytes)
    print(f"train: {meta.train_files} files, {meta.train_bytes} bytes, {n_train} tokens")
    print(f"held out: {len(meta.held_names)} files, {n_held} bytes")


def _baselines(options: argparse.Namespace) -> None:
    """Print what xz and 5-gram models need for the held-out files, in bits per byte."""
    from tokenizers import Tokenizer

    files = tokens.load(options.data)
    tokenizer = Tokenizer.from_file(str(options.data / "tokenizer.json"))
    n_bytes = sum(files.meta.held_bytes)
    held = [tokenizer.decode(ids.tolist()).encode() for ids in files.held]
    trained = tokenizer.decode(files.train.tolist()).encode()
    if [len(text) for text in held] != files.meta.held_bytes:
        sys.exit("baselines: the token files belong to another tokenizer")
    _show("xz -9e", ngram.xz_bits(b"".join(held)), n_bytes)
    _show("xz -9e after the training text", ngram.xz_bits(b"".join(held), trained), n_bytes)
    by_byte = ngram.KneserNey([np.frombuffer(trained, np.uint8)], 8)
    _show("5-gram of bytes", sum(map(by_byte.bits_of, map(_as_bytes, held))), n_bytes)
    by_token = ngram.KneserNey([files.train], (files.meta.vocab_size - 1).bit_length())
    _show("5-gram of tokens", sum(by_token.bits_of(ids[1:-1]) for ids in files.held), n_bytes)


def _as_bytes(text: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(text, np.uint8)


def _show(what: str, bits: float, n_bytes: int) -> None:
    print(f"{what}: {bits / n_bytes:.4f} bits per byte", flush=True)


def _train(options: argparse.Namespace) -> None:
    """Train, write the checkpoint and judge it as written."""
    from demo_model import checkpoint, training

    files = tokens.load(options.data)
    shape = _changed(Shape(vocab_size=files.meta.vocab_size), options.set)
    recipe = _changed(training.Recipe(), options.set)
    training.make_deterministic(recipe.seed)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log = _Log()
    log(json.dumps({"shape": asdict(shape), "recipe": asdict(recipe)}))
    model = training.train(shape, recipe, files, device, log)
    log(f"parameters: {sum(weight.numel() for weight in model.parameters())}")
    checkpoint.save(model, options.data / "tokenizer.json", options.checkpoint)
    (options.checkpoint / "training.log").write_text("\n".join(log.lines) + "\n")
    _evaluate(options)


class _Log:
    """Prints lines and keeps them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def _evaluate(options: argparse.Namespace) -> None:
    """Print bits per byte on the held-out files, and samples; write them beside the checkpoint."""
    import torch
    from demo_model import checkpoint, judging

    files = tokens.load(options.data)
    shape = _changed(Shape(vocab_size=files.meta.vocab_size), options.set)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = judging.network_logits(checkpoint.load(options.checkpoint, shape).to(device))
    if options.transformers:
        logits = _compared(logits, options.checkpoint, files, device)
    sizes = dict(zip(files.meta.held_names, files.meta.held_bytes, strict=True))
    result: dict[str, dict[str, float]] = {}
    for context in (shape.short_context, shape.context):
        bits = judging.held_out_bits(logits, files, context, device)
        result[str(context)] = bits
        for kind in ("", "Lib/", "Doc/"):
            names = [name for name in bits if name.startswith(kind)]
            label = f"held out {kind or 'all'} ({len(names)} files), context {context}"
            _show(label, sum(bits[n] for n in names), max(1, sum(sizes[n] for n in names)))
    (options.checkpoint / "held_out.json").write_text(json.dumps(result, indent=1))
    _samples(logits, options)


def _compared(logits: Logits, folder: Path, files: tokens.TokenFiles, device: Any) -> Logits:
    """The logits of transformers' model, after printing how far ours are from them."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    ids = torch.from_numpy(files.held[0][:1000].astype(np.int64)).to(device)[None]
    with torch.no_grad():
        far = (logits(ids) - loaded(ids).logits).abs().max().item()
    print(f"largest difference of logits from transformers': {far:.2e}", flush=True)
    return lambda ids: loaded(ids).logits


def _samples(logits: Logits, options: argparse.Namespace) -> None:
    from demo_model import judging
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    written = []
    for seed, prompt in enumerate(judging.PROMPTS):
        ids = [tokens.BOS_ID, *tokenizer.encode(prompt).ids]
        for temperature in (0.0, 0.7):
            found = judging.sample(logits, ids, _SAMPLE_TOKENS, temperature, seed)
            text = tokenizer.decode(found)
            written.append({"prompt": prompt, "temperature": temperature, "text": text})
            print(f"----- temperature {temperature}\n{prompt}|{text}", flush=True)
    (options.checkpoint / "samples.json").write_text(json.dumps(written, indent=1))


def _changed(defaults: Any, changes: list[str]) -> Any:
    """The dataclass with the ``name=value`` pairs that it knows."""
    pairs = dict(change.split("=", 1) for change in changes)
    kinds = {field.name: type(getattr(defaults, field.name)) for field in fields(defaults)}
    return replace(defaults, **{k: kinds[k](v) for k, v in pairs.items() if k in kinds})


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
