"""Train pico from nothing to the shipped weights: `python -m vlmflow.pico.train`.

Stopping it loses at most five minutes: it goes on from its last checkpoint.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from vlmflow.pico.batches import collate, scene_example
from vlmflow.pico.curriculum import STAGES, Stage
from vlmflow.pico.learning import PatchWords, naming_loss, see
from vlmflow.pico.model import build_model, resize_positions
from vlmflow.pico.muon import Muon
from vlmflow.pico.text import build_tokenizer

SEED = 0
CHECKPOINT_SECONDS = 300
WARMUP = 50  # steps
LOG_EVERY = 20


def optimizers(model, stage):
    tower = [p for n, p in model.named_parameters() if "vision_tower" in n or "projector" in n]
    if not stage.questions[0]:
        hidden = [p for n, p in model.named_parameters() if "vision_tower" in n and p.ndim == 2 and "layers." in n]
        rest = [p for p in tower if all(p is not h for h in hidden)] + [model.get_input_embeddings().weight]
        return [
            Muon(hidden, lr=stage.muon_rate, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=stage.adam_rate, weight_decay=0.01, betas=(0.9, 0.95)),
        ]
    raise NotImplementedError


def rate(stage, step):
    left = (stage.steps - step) / (stage.decay * stage.steps)
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.03, left))


def main(out=Path("runs/pico")):
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    words = PatchWords.of(tokenizer)
    path = out / "checkpoint.pt"
    state = torch.load(path, weights_only=False) if path.exists() else None
    start, first = (state["stage"], state["step"]) if state else (0, 0)
    weights = state["weights"] if state else None
    saved = time.monotonic()
    for index in range(start, len(STAGES)):
        stage = STAGES[index]
        model = build_model(stage.canvas, SEED)
        if weights:
            model.load_state_dict(resize_positions(weights, stage.canvas))
        opts = optimizers(model, stage)
        if state and first:
            for o, s in zip(opts, state["optimizers"], strict=True):
                o.load_state_dict(s)
        bases = [[g["initial_lr"] if "initial_lr" in g else g["lr"] for g in o.param_groups] for o in opts]
        for o, base in zip(opts, bases, strict=True):
            for g, b in zip(o.param_groups, base, strict=True):
                g["initial_lr"] = b
        E = model.get_input_embeddings().weight
        params = [p for o in opts for g in o.param_groups for p in g["params"]]
        began = time.monotonic()

        def save(step, stage_index):
            tmp = path.with_suffix(".tmp")
            torch.save(
                {
                    "stage": stage_index,
                    "step": step,
                    "weights": model.state_dict(),
                    "optimizers": [o.state_dict() for o in opts],
                },
                tmp,
            )
            os.replace(tmp, path)

        for step in range(first, stage.steps):
            for o in opts:
                for g in o.param_groups:
                    g["lr"] = g["initial_lr"] * rate(stage, step)
            seeds = range(step * stage.scenes, (step + 1) * stage.scenes)
            batch = collate(
                tokenizer,
                [
                    scene_example("train", index * 10**7 + s, stage.canvas, stage.counts, stage.questions)
                    for s in seeds
                ],
            )
            loss, right = naming_loss(see(model, batch.pixels), E, words, batch.patches)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            for o in opts:
                o.step()
                o.zero_grad(set_to_none=True)
            if (step + 1) % LOG_EVERY == 0:
                print(
                    json.dumps(
                        {"stage": stage.name, "step": step + 1, "loss": round(loss.item(), 3)}
                        | {k: round(v, 3) for k, v in right.items()}
                        | {"s": round(time.monotonic() - began)}
                    ),
                    flush=True,
                )
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save(step + 1, index)
                saved = time.monotonic()
        save(0, index + 1)
        weights, state, first = model.state_dict(), None, 0


if __name__ == "__main__":
    main()
