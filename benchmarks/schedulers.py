"""Cost of a scheduler step without the model, in `step()` and in our loop, compared with the reference."""

from __future__ import annotations

import time
import warnings

import torch

from benchmarks.results import Result

__all__ = ["step_overhead"]

SHAPE = (1, 4, 64, 64)


def step_overhead(runs: int, steps: int = 20) -> list[Result]:
    """Measure the seconds per step of each of the 14 schedulers, including scaling of the model's input."""
    import diffusers

    import sfumato
    from sfumato.schedulers.names import NAMES
    from sfumato.schedulers.rows import State, advance

    results = []
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    output = torch.randn(SHAPE)
    for name in sorted({alias.class_name for alias in NAMES.values()}):
        ours = getattr(sfumato, name)(**config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = getattr(diffusers, name)(**config)

        def stepping(scheduler, steps: int = steps) -> float:
            scheduler.set_timesteps(steps)
            x = torch.randn(SHAPE)
            began = time.perf_counter()
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(output, t, x, return_dict=False)[0]
            return (time.perf_counter() - began) / len(scheduler.timesteps)

        def advancing(scheduler=ours, steps: int = steps) -> float:
            scheduler.set_timesteps(steps)
            state = State(torch.randn(SHAPE))
            noise = scheduler.noise_source(SHAPE, None, "cpu")
            began = time.perf_counter()
            rows = scheduler.table().rows
            for row in rows:
                _ = state.x if row.c_in == 1 else state.x * row.c_in
                state = advance(row, state, output, noise)
            return (time.perf_counter() - began) / len(rows)

        stepping(ours), stepping(theirs), advancing()
        times = [(stepping(ours), advancing(), stepping(theirs)) for _ in range(runs)]
        mine, loop, reference = (list(column) for column in zip(*times, strict=True))
        results.append(Result.of_times(f"{name}.step (diffusers)", mine, reference))
        results.append(Result.of_times(f"{name}, our loop (diffusers)", loop, reference))
    return results
