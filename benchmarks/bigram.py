"""Baselines: unigram and interpolated bigram models of the tokens that a config trains on."""

from pathlib import Path

import numpy as np

from gptlit.data.prepare import prepare_cached
from gptlit.data.sources import open_corpus
from gptlit.data.splitting import Split
from gptlit.data.token_files import TokenData
from gptlit.data.tokenizer import load_tokenizer


def run(source: str = "python-docs", val_fraction: float = 0.05, cache_dir: str = "data") -> None:
    """Print the validation loss, in nats per token, of models counted on the training tokens.

    Args:
        source: As `data.source`.
        val_fraction: As `data.val_fraction`.
        cache_dir: As `data.cache_dir`.
    """
    data = prepare_cached(open_corpus(source), Path(cache_dir), load_tokenizer(), Split(val_fraction))
    train, val = tokens(data, "train"), tokens(data, "val")
    for name, loss in losses(train, val, load_tokenizer().n_vocab).items():
        print(f"{name:<42}{loss:.4f}")


def tokens(data: TokenData, split: str) -> np.ndarray:
    """Return all ids of a split."""
    return np.concatenate([shard.ids for shard in data.shards(split)]).astype(np.int64)


def losses(train: np.ndarray, val: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Return each model's loss on `val`. Interpolation weights are chosen on `val` itself, which favours the baselines.

    Source: Jelinek and Mercer 1980 (interpolation); Witten and Bell 1991 (weight from the number of followers).
    """
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    val_pairs = val[:-1] * vocab_size + val[1:]
    found = np.searchsorted(pairs, val_pairs).clip(max=len(pairs) - 1)
    bigram_counts = np.where(pairs[found] == val_pairs, pair_counts[found], 0)
    context_counts = np.bincount(train[:-1], minlength=vocab_size)[val[:-1]]
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)[val[:-1]]
    unigram_probs = np.bincount(train, minlength=vocab_size)[val[1:]] / len(train)

    def unigram(uniform: float) -> np.ndarray:
        return (1 - uniform) * unigram_probs + uniform / vocab_size

    def jelinek_mercer(weight: float, uniform: float) -> float:
        seen = np.where(context_counts > 0, bigram_counts / context_counts.clip(min=1), 0)
        return loss((1 - weight) * seen + weight * unigram(uniform))

    def witten_bell(uniform: float) -> float:
        smoothed = (bigram_counts + followers * unigram(uniform)) / (context_counts + followers).clip(min=1)
        return loss(np.where(context_counts > 0, smoothed, unigram(uniform)))

    def loss(probs: np.ndarray) -> float:
        return float(-np.log(probs).mean())

    uniforms = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2)
    return {
        "unigram": min(loss(unigram(uniform)) for uniform in uniforms),
        "bigram, interpolated (Jelinek-Mercer)": min(
            jelinek_mercer(weight, uniform) for weight in np.arange(0.1, 0.9, 0.05) for uniform in uniforms
        ),
        "bigram, interpolated (Witten-Bell)": min(map(witten_bell, uniforms)),
    }
