"""What f is: by head, layer and kind of word, how it is distributed, how phases grow, and a sentence colored by it.

    python -m lab.analyze freq runs/small-carope --text "In 1969, three people flew to the Moon."

f(x_t)_h is the angle in radians by which token t turns pair 1 in head h (2507.23083, section 2; RoPE: θ_1 for all). The phase
distance φ_1 of two tokens is Σ f over the tokens after the first, up to the second. Both are read from the validation set in
windows of the training length. Files: freq.json, freq.png (f by class, distribution, phase distance), freq.html, freq_text.png.

Shapes: L sites (layers, or 1 where they share one f), H heads, W windows, T positions, N = W · T tokens.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.checkpoint import load_model
from core.data import TokenStream
from core.distributed import Distributed, pick_dtype
from core.errors import UserError, at_least
from core.files import atomic_write
from eval_ppl import default_batch
from lab.analyze.freq_figures import draw_summary, draw_text, render_html
from lab.analyze.frequencies import collect, layers, rope_theta, rotary, validation, varies
from lab.analyze.token_classes import CLASSES, classify
from model import GPT
from positional.carope import COLLAPSED
from text.tokenizer import Tokenizer, load_tokenizer

TEXT = (
    "In 1969, three people flew to the Moon; two of them walked on it, and the third, who stayed in orbit, did not see them "
    "for 21 hours."
)
MAX_TEXT = 4096  # tokens
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its own options; lab.analyze has the others."""
    add = parser.add_argument
    add("--text", default=TEXT, metavar="SENTENCE", help="what to color by f [default: a sentence about the Moon]")
    add(
        "--max_tokens",
        "--max-tokens",
        type=int,
        default=65_536,
        help="tokens of the validation set; f of every head is kept, 4 bytes each [default: 65536]",
    )


def run(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Draw the figures of the one run of `args`; returns what stands in the JSON."""
    if len(args.runs) > 1:
        raise UserError(f"{args.runs[1]}: freq looks at one run at a time; call it once for each")
    at_least(2, max_tokens=args.max_tokens)
    model, state, folder = load_model(args.runs[0])
    check(model, args.runs[0])
    tokenizer, stream = load_tokenizer(state.tokenizer), validation(model, state, args.runs[0], args.data)
    with Distributed.start(args.device, "auto") as dist:
        model.to(dist.device)
        dist.dtype = pick_dtype(model.cfg.dtype, dist.device)
        with dist.autocast():
            ids_WT, f_LHWT = sample(model, stream, args.max_tokens)
            text = of_text(model, args.text, tokenizer)
    cfg = model.cfg
    found = {
        "run": cfg.name, "encoding": cfg.encoding, "step": state.step, "checkpoint": str(folder), "data": str(stream.folder),
        "tokens": ids_WT.size, "block_size": cfg.block_size, "theta_1": rope_theta(model),
        **statistics(f_LHWT, np.array(classify(ids_WT.flatten().tolist(), tokenizer)), layers(model), rope_theta(model)),
        "text": text,
    }  # fmt: skip
    draw_summary(found, out / "freq.png")
    draw_text(found, out / "freq_text.png")
    with atomic_write(out / "freq.html") as file:
        file.write(render_html(found).encode())
    return found


def check(model: GPT, path: str) -> None:
    """Raise UserError for an encoding without an f, or with one that is the same for all tokens and heads."""
    if varies(model)[1]:
        return
    why = "has no f"
    if (encodings := rotary(model)) and encodings[0].fused:  # f describes the whole rotation
        f = encodings[0].frequency(torch.zeros(1, 1, model.cfg.n_embd)).item()
        why = f"has one f for all tokens and heads, the constant {f:.4g}"
    raise UserError(f"{path}: encoding {model.cfg.encoding!r} {why}; freq looks at the encodings of carope's family")


def sample(model: GPT, stream: TokenStream, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of the validation set in windows of the training length, (W, T), and their f, (L, H, W, T) float32."""
    n_tokens = min(len(stream), max_tokens)
    T = min(model.cfg.block_size, n_tokens)
    ids_WT = stream.read(0, n_tokens // T * T).astype(np.int64).reshape(-1, T)
    batch = min(64, default_batch(T, model.cfg))
    parts = torch.from_numpy(ids_WT).split(batch)
    f_LWHT = torch.cat([collect(model, part.to(model.wte.weight.device)).cpu() for part in parts], dim=1)
    return ids_WT, f_LWHT.transpose(1, 2).numpy()


def of_text(model: GPT, text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokens of `text` as a document of its own, what they are, and their f, [layer][head][token]."""
    ids = [tokenizer.eot, *tokenizer.encode(text).tolist()]
    if not 1 < len(ids) <= MAX_TEXT:
        raise UserError(f"--text: {len(ids) - 1} tokens; must be from 1 to {MAX_TEXT - 1}")
    f_LHT = collect(model, torch.tensor([ids], device=model.wte.weight.device))[:, 0].cpu().double()
    pieces = [tokenizer.decode_bytes([i]).decode(errors="backslashreplace") for i in ids]
    return {
        "tokens": ["¶", *pieces[1:]],
        "classes": [CLASSES[k] for k in classify(ids, tokenizer)],
        "f": [[[round(f, 6) for f in f_T] for f_T in f_HT] for f_HT in f_LHT.tolist()],
    }


def statistics(f_LHWT: np.ndarray, class_N: np.ndarray, of_layers: list[int | None], theta: float) -> dict[str, Any]:
    """A record per layer and head, and the phase distances over all of them."""
    by_head, overall = phase_distances(f_LHWT, theta)
    records = []
    for site, f_HWT in enumerate(f_LHWT):
        for head, f_WT in enumerate(f_HWT):
            one = of_head(f_WT.reshape(-1).astype(np.float64), class_N)
            records.append({"layer": of_layers[site], "head": head, **one, "phase_distance": by_head[site][head]})
    mean_LN = f_LHWT.mean(1, dtype=np.float64).reshape(len(f_LHWT), -1)
    return {
        "class_tokens": {name: int((class_N == k).sum()) for k, name in enumerate(CLASSES)},
        "heads": records,
        "mean_of_heads": [
            {"layer": layer, "mean": f_N.mean(), "std": f_N.std()} for layer, f_N in zip(of_layers, mean_LN, strict=True)
        ],
        "phase_distance": overall,
    }


def of_head(f_N: np.ndarray, class_N: np.ndarray) -> dict[str, Any]:
    """Moments and quantiles of f over tokens, and by class; `class_share` is the share of its variance between classes."""
    mean, std = f_N.mean(), f_N.std()
    classes, between = {}, 0.0
    for k, name in enumerate(CLASSES):
        f_n = f_N[class_N == k]
        if len(f_n):
            p10, p90 = np.quantile(f_n, (0.1, 0.9)).tolist()
            classes[name] = {"mean": f_n.mean(), "std": f_n.std(), "p10": p10, "p90": p90}
            between += len(f_n) * (f_n.mean() - mean) ** 2
    collapsed = bool(std < COLLAPSED * mean)
    return {
        "mean": mean,
        "std": std,
        "collapsed": collapsed,
        "quantiles": {f"{q:g}": value for q, value in zip(QUANTILES, np.quantile(f_N, QUANTILES).tolist(), strict=True)},
        "class_share": None if collapsed else between / (len(f_N) * std**2),
        "classes": classes,
    }


def phase_distances(f_LHWT: np.ndarray, theta: float) -> tuple[list[list[list[dict[str, float]]]], list[dict[str, float]]]:
    """φ_1 between tokens n apart, n = 1, 2, 4 …: mean and 10–90 % over positions, for each layer and head, and over all."""
    phase_LHWT = np.cumsum(f_LHWT, axis=-1, dtype=np.float64)
    L, H, _, T = f_LHWT.shape
    by_head: list[list[list[dict[str, float]]]] = [[[] for _ in range(H)] for _ in range(L)]
    overall = []
    for n in [2**k for k in range(T.bit_length()) if 2**k < T]:
        apart_LHN = (phase_LHWT[..., n:] - phase_LHWT[..., :-n]).reshape(L, H, -1)
        low_LH, high_LH = np.quantile(apart_LHN, (0.1, 0.9), axis=-1)
        mean_LH = apart_LHN.mean(-1)
        for layer in range(L):
            for head in range(H):
                at = layer, head
                by_head[layer][head].append({"n": n, "mean": mean_LH[at], "p10": low_LH[at], "p90": high_LH[at]})
        low, high = np.quantile(apart_LHN, (0.1, 0.9)).tolist()
        overall.append({"n": n, "mean": apart_LHN.mean(), "p10": low, "p90": high, "rope": n * theta})
    return by_head, overall
