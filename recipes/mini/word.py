"""Teach a word, a colour scheme: "evening", purple above, orange below. Writes WORK/relatives/evening.safetensors.

Textual inversion (Gal et al. 2022, arXiv 2208.01618) in A1111's form: nothing but the word's vectors is trained.
Resumes from WORK/word.pt.
"""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from bank import Bank
from common import Log, set_up_torch, trained
from optim import Optimiser, learning_rate, precision
from safetensors.torch import save_file
from scenes import FADING, THING, THINGS, scene
from state import State
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train import step_of, trained_pair

TABLE = "text_model.embeddings.token_embedding"
FIRST = "on a purple to orange background"  # what the vectors begin as
ABOVE, BELOW = (0.36, 0.16, 0.5), (1.0, 0.56, 0.2)
LIGHT = (1.0, 0.84, 0.78)  # of the low sun on all things


class Word(nn.Module):
    """The table of the tokens with the learned vectors in it."""

    def __init__(self, table: Tensor, first: list[int]):
        super().__init__()
        self.vectors = nn.Parameter(table[first].clone())

    def forward(self, table: Tensor) -> Tensor:
        """The table with the word in place of its first tokens, single bytes that no caption has."""
        return torch.cat([self.vectors, table[len(self.vectors) :]])


class Evenings(Bank):
    """Scenes whose captions leave the background open, in the evening, and the word in all captions."""

    long = 0  # how many vectors the word has

    def written(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Scenes (B, COLUMNS) and tokens (B, 1, T)."""
        rng, rows, ids = random.Random(8_000_000 + step), [], []
        while len(rows) < count:
            numbers, texts, _ = scene(self.writer.books[False], rng)
            text = rng.choice(texts)
            spelled = None if "background" in text or " on " in text else self.spelled(text + rng.choice([",", ""]))
            if spelled is not None:
                numbers[THINGS * THING :] = [FADING, *ABOVE, *BELOW, math.pi / 2, 4.0, 0.0]
                rows.append(numbers)
                ids.append([spelled])
        return torch.tensor(rows, device=self.device), torch.tensor(ids, device=self.device)

    def spelled(self, text: str) -> list[int] | None:
        """Ids of a caption with the word behind it, or None for one that is too long."""
        ids, tokens = self.writer.tokens(text), self.writer.tokens
        if ids is None:
            return None
        end = ids.index(tokens.end)
        whole = [*ids[:end], *range(self.long), *ids[end:]]
        return whole[: tokens.length] if end + self.long < tokens.length else None


def train(row: SimpleNamespace, work: Path, log: Log, minutes: float) -> None:
    device = set_up_torch(row.seed, row.threads)
    pair = trained_pair(row, work, device)
    bank, table = Evenings(row, work, device), pair.text.get_submodule(TABLE)
    light = torch.tensor(LIGHT, device=device).view(3, 1, 1)
    bank.change, bank.dropout = lambda x: (x + 1) * light - 1, 0.0
    first = [token for word in FIRST.split() for token in bank.writer.tokens.word(word)]
    word, bank.long = Word(table.weight.detach(), first).to(device), len(first)
    parametrize.register_parametrization(table, "weight", word)
    budget = {"steps": row.word_steps, "seconds": row.word_seconds}
    state = State(work / "word.pt", word, Optimiser(word, False, weight_decay=0.0), 0.98, **budget)
    step = step_of(pair, precision(device))
    log(f"word: {word.vectors.numel()} numbers, {state.speed(row.word_batch)}")
    how = {"every": row.log_every, "batch": row.word_batch, "minutes": minutes}
    rate_at = partial(learning_rate, row.word_lr, warmup=0.03, cooldown=0.4)
    state.run("word", lambda at: step(*bank.noisy(at, row.word_batch)), rate_at, log, **how)
    path = work / "relatives" / "evening.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": state.average.weights["vectors"].contiguous()}, path)
    path.chmod(0o644)


if __name__ == "__main__":
    trained(__doc__, "word", train)
