"""The page "Coming from diffusers", made from the same table as errors and log messages."""

from __future__ import annotations

from sfumato.ecosystem import table

__all__ = ["diffusers_page"]

HEAD = """# Coming from diffusers

Replace `from diffusers import …` with `from sfumato import …`. Pipelines, models, schedulers and the tokenizer take the
same arguments and, in float32 with a CPU generator, compute the same numbers. Outputs can be read as `out.images`,
`out["images"]` or `out[0]`; configs are dicts.

```python
from sfumato import DPMSolverMultistepScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", low_cpu_mem_usage=True)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
pipe.enable_model_cpu_offload()  # not needed: the plan decides, and the log says so
embeds, negative = pipe.encode_prompt("a lighthouse in fog", pipe.device, 1, True, "blurry")
image = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=2).images[0]
```

If Sfumato does not have a name, `hasattr` is False, and using it raises an error that says what to use instead. The
tables below list these names. A `*` stands for any text.

```python
import sfumato

if not hasattr(sfumato, "FluxPipeline"):
    print("FLUX is not supported")
```
"""
TITLES = {
    "meaning": ("Names with a different effect", "name | in diffusers | in Sfumato"),
    "package": ("Not in the package", "name | what it is | in Sfumato"),
    "pipeline": ("Not on pipelines", "name | what it is | in Sfumato"),
    "argument": ("Not among the arguments of pipeline calls", "name | what it is | in Sfumato"),
    "part": ("Not on models, schedulers and tokenizers", "name | what it is | in Sfumato"),
    "utils": ("Not in `sfumato.utils`", "name | what it is | in Sfumato"),
    "logging": ("Not in `sfumato.utils.logging`", "name | what it is | in Sfumato"),
}


def diffusers_page() -> str:
    """Every name of the table, by section."""
    parts = [HEAD]
    for where, (title, heads) in TITLES.items():
        rows = [f"| `{name}` | {what} | {here} |" for name, (what, here) in table()[where].items()]
        parts.append("\n".join([f"## {title}\n", f"| {heads} |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)
