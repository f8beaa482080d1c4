"""What must be equal on a GPU: the engine's laws, and the embedded model's answers.

In float32 the laws are the test suite's own files, run with ``VLMFLOW_DEVICE=cuda`` and TF32 off. In bfloat16, where a
ranking may tip at the last bit, they are restated here so that no tipped rank can excuse a wrong state: the kept tokens
are taken from the trace, and the unpruned model with the dropped keys masked must then say the same.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmflow.engine import attach
from vlmflow.latency import machine
from vlmflow.models import VLM, Question, load
from vlmflow.pruners import VTW, FastV, HiMAP, Pruner, PyramidDrop, Unpruned
from vlmflow.tasks import TASKS, Source

TESTS = Path(__file__).parents[1] / "tests"
FILES = ("test_laws", "test_generate", "test_attach", "test_kernels", "test_tap", "test_cost_of_pruning")
FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "mistral3")  # no sliding windows
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # and the package of each
KEEP_ALL = (HiMAP(2, 0.0, 4, 0.0), FastV(2, 0.0), PyramidDrop((2, 4), 0.0))
PRUNERS = (HiMAP(2, 0.5, 4, 0.75), FastV(2, 0.6), PyramidDrop((1, 3, 5), 0.5), VTW(3))
TOLERANCE = 0.1  # of the logits' norm: rounding gives 0.01 to 0.06, a key too many or too few several times that
WORKERS = 8
ASKED, BATCH = 1000, 32
WANTED = 0.995  # share of pico's answers that must be the CPU's


def installed() -> dict[str, str | None]:
    """The attention kernels to prove, each with the reason why it cannot be, or None."""
    reasons: dict[str, str | None] = {"sdpa": None, "eager": None}
    for name, package in FLASH.items():
        reasons[name] = None if find_spec(package) else f"{package} is not installed"
    return reasons


def laws(dry: bool) -> dict[str, Any]:
    """The test suite's law files in float32, counted by file."""
    device = "cpu" if dry else "cuda"
    chosen = ["test_kernels.py", "-k", "without_padding"] if dry else [f"{name}.py" for name in FILES]
    workers = min(WORKERS, os.cpu_count() or 1)
    spread = ["-n", str(workers)] if find_spec("xdist") and not dry else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *chosen, *spread, "-p", "no:cacheprovider", f"--junitxml={report}"],
            cwd=TESTS,
            env=os.environ | {"VLMFLOW_DEVICE": device},
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists():
            raise RuntimeError(f"pytest did not run:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
        files, failures = counted(report)
    record = {"geometry": "tiny models", "machine": machine(torch.device(device)), "dtype": "float32"}
    return record | {"files": files, "failures": failures}


def counted(report: Path) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Passed, failed and skipped tests by file, and what each failed one said, from pytest's XML."""
    files: dict[str, Counter[str]] = {}
    failures = {}
    for case in ElementTree.parse(report).iter("testcase"):
        where = next(part for part in case.attrib["classname"].split(".") if part.startswith("test_"))
        wrong = next((found for tag in ("failure", "error") if (found := case.find(tag)) is not None), None)
        outcome = "failed" if wrong is not None else "skipped" if case.find("skipped") is not None else "passed"
        files.setdefault(where, Counter(passed=0, failed=0, skipped=0))[outcome] += 1
        if wrong is not None:
            failures[f"{where}::{case.attrib['name']}"] = wrong.attrib.get("message", "").split("\n")[0][:300]
    return {name: dict(outcomes) for name, outcomes in files.items()}, failures


def bfloat16_laws(dry: bool) -> dict[str, Any]:
    """Keep-everything, knock-out, cached step, batch and cache lengths in bfloat16; streams, threads, compilation."""
    device = torch.device("cpu" if dry else "cuda")
    tiny, oracles = _of_tests("tiny"), _of_tests("oracles")
    kernels = {"sdpa": None} if dry else installed()
    checks: list[dict[str, Any]] = []

    def check(name: str, where: str, prove: Callable[[], float], limit: float) -> None:
        """Note the largest error that ``prove`` finds, which must not pass the limit; what it raises is a failure."""
        try:
            error, reason = prove(), None
        except Exception as failure:
            error, reason = None, f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
        passed = error is not None and error <= limit
        checks.append({"law": name, "where": where, "error": error, "limit": limit, "passed": passed, "reason": reason})

    for family in FAMILIES[:1] if dry else FAMILIES:
        slow = _moved(tiny.build(family, "eager").model, device)
        for kernel in (kernel for kernel, reason in kernels.items() if reason is None):
            small = tiny.build(family, kernel)
            model = _moved(small.model, device)
            batch = _placed(small.collate(small.samples), device)
            samples = [_placed(sample, device) for sample in small.samples]
            for pruner in KEEP_ALL:
                where = f"{family}, {kernel}, {pruner}"
                check("keep everything", where, lambda m=model, b=batch, p=pruner: kept_all(m, b, p), 0.0)
            for pruner in PRUNERS:
                proof = Proof(model, slow, oracles, pruner)
                where = f"{family}, {kernel}, {pruner}"
                check("knock-out", where, lambda p=proof, s=samples: max(map(p.knocked_out, s)), TOLERANCE)
                check("cached step", where, lambda p=proof, s=samples: max(map(p.cached_step, s)), TOLERANCE)
                check("cache lengths", where, lambda p=proof, s=samples: max(map(p.cache_lengths, s)), 0.0)
                check("batch", where, lambda p=proof, b=batch, s=samples: p.batch(b, s), TOLERANCE)
    small = tiny.build("llava")
    exact = copy.deepcopy(small.model).to(device)
    samples = [{name: tensor.to(device) for name, tensor in sample.items()} for sample in small.samples[:2]]
    check("two threads, two streams", "llava, float32", lambda: in_threads(exact, samples), 1e-4)
    check("compiled beside", "llava, float32", lambda: compiled_beside(exact, samples[0]), 1e-4)
    check("compiled is refused", "llava, float32", lambda: compiled_is_refused(exact), 0.0)
    record = {"geometry": "tiny models", "machine": machine(device), "dtype": "bfloat16", "checks": checks}
    return record | {"kernels_left_out": {name: reason for name, reason in kernels.items() if reason}}


def kept_all(model: Any, batch: dict[str, Tensor], pruner: Pruner) -> float:
    """Law 1: how far keeping everything moves any logit."""
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits
        with attach(model, pruner):
            logits = model(**batch).logits
    return float((logits[real] - expected[real]).abs().max())


class Proof:
    """A pruner on a model, against the same weights on eager attention where the dropped keys are masked."""

    def __init__(self, model: Any, slow: Any, oracles: Any, pruner: Pruner):
        self.model, self.slow, self.oracles, self.pruner = model, slow, oracles, pruner

    def knocked_out(self, sample: dict[str, Tensor]) -> float:
        """Law 2: pruning is masking the dropped keys from their layer on."""
        with attach(self.model, self.pruner) as trace, torch.no_grad():
            logits = self.model(**sample).logits[0]
        text = ~trace.layout.image[0]
        expected, _ = self.oracles.masked_forward(self.slow, sample, self._dropped(trace, sample))
        return _error(logits[text], expected[text])

    def cached_step(self, sample: dict[str, Tensor]) -> float:
        """Law 3: a token read on the pruned cache sees what it would see with the dropped keys masked."""
        places = self.oracles.generation_positions(self.slow, sample, 2)
        longer = self.oracles.extend(self.slow, sample, 5)
        with attach(self.model, self.pruner) as trace, torch.no_grad():
            cache = self.model(**sample, use_cache=True).past_key_values
            token = {"input_ids": longer["input_ids"][:, -1:], "attention_mask": longer["attention_mask"]}
            step = self.model(**token, past_key_values=cache, **_position(places)).logits[0, -1]
        dropped = self._dropped(trace, sample)
        return _error(step, self.oracles.masked_forward(self.slow, longer, dropped, places)[0][-1])

    def cache_lengths(self, sample: dict[str, Tensor]) -> float:
        """Law 8: by how many slots any layer's cache is off its schedule."""
        with attach(self.model, self.pruner) as trace, torch.no_grad():
            cache = self.model(**sample, use_cache=True).past_key_values
        images, length = int(trace.layout.image.sum()), sample["input_ids"].shape[1]
        schedule = self.pruner.schedule(trace.n_layers, images)
        lengths = zip(cache.layers, schedule, strict=True)
        return float(max(abs(layer.keys.shape[-2] - (length - images + kept)) for layer, kept in lengths))

    def batch(self, batch: dict[str, Tensor], samples: list[dict[str, Tensor]]) -> float:
        """Law 4, for the samples whose kept tokens no rounding has tipped; half of them at least."""
        with attach(self.model, self.pruner) as trace, torch.no_grad():
            together, kept = self.model(**batch).logits[:, -1], trace.kept[:]
            errors = []
            for number, sample in enumerate(samples):
                padding = batch["input_ids"].shape[1] - sample["input_ids"].shape[1]
                alone = self.model(**sample).logits[0, -1]
                pairs = zip(kept, trace.kept, strict=True)
                if all(torch.equal(layer[number] - padding, own[0]) for layer, own in pairs):
                    errors.append(_error(together[number], alone))
        if 2 * len(errors) < len(samples):
            raise AssertionError(
                f"in a batch, {len(samples) - len(errors)} of {len(samples)} samples keep other tokens"
            )
        return max(errors)

    def _dropped(self, trace: Any, sample: dict[str, Tensor]) -> dict[int, set[int]]:
        stages_ = self.pruner.stages(trace.n_layers, int(trace.layout.image.sum()))
        kept = {stage.layer: trace.kept[stage.layer][0].tolist() for stage in stages_}
        return self.oracles.drops(self.slow, sample, kept)


def in_threads(model: Any, samples: list[dict[str, Tensor]]) -> float:
    """Two threads, each on a stream of its own, share an attached model; each gets what it gets alone."""
    errors: dict[int, float] = {}

    def read(number: int) -> Float[Tensor, " vocab"]:
        with torch.no_grad():
            return model(**samples[number]).logits[0, -1]

    def work(number: int, expected: Tensor) -> None:
        stream = torch.cuda.Stream() if expected.is_cuda else None
        if stream is not None:
            stream.wait_stream(torch.cuda.default_stream())
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            errors[number] = max(float((read(number) - expected).abs().max()) for _ in range(5))

    with attach(model, PRUNERS[0]):
        expected = [read(number) for number in range(len(samples))]
        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(expected)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(errors) < len(samples):
        raise AssertionError("a thread ended by an exception")
    return max(errors.values())


def compiled_beside(model: Any, sample: dict[str, Tensor]) -> float:
    """A compiled copy of the unpruned model runs beside a pruned one."""
    twin = copy.deepcopy(model)
    backend = "inductor" if model.device.type == "cuda" else "eager"
    with torch.no_grad():
        expected = twin(**sample).logits
        with attach(model, PRUNERS[0]):
            model(**sample)
            logits = torch.compile(twin, backend=backend)(**sample).logits
            model(**sample)
    return float((logits - expected).abs().max())


def compiled_is_refused(model: Any) -> float:
    """0 where attaching to a compiled model is refused: its code would not see the hooks."""
    try:
        attach(torch.compile(copy.deepcopy(model)), PRUNERS[0])
    except ValueError as refusal:
        return 0.0 if "compiled" in str(refusal) else 1.0
    return 1.0


def pico(dry: bool) -> dict[str, Any]:
    """The embedded model's greedy answers here and on the CPU, pruned and not, question by question."""
    device = "cpu" if dry else "cuda"
    task = TASKS["pico"]
    samples = task.samples(Source(), 2 if dry else ASKED)
    questions = [Question(task.prompt(s, None), tuple(p.open() for p in s.images)) for s in samples]
    here, there = load("pico", device), load("pico", "cpu")
    rows = []
    for name, pruner in {"none": Unpruned(), "himap": HiMAP.scaled(here.n_layers)}.items():
        ours, cpus = (list(_answers(vlm, questions, pruner)) for vlm in (here, there))
        answers = list(zip(samples, ours, cpus, strict=True))
        differing = [
            {"id": sample.id, "question": sample.question, "here": our, "cpu": cpu}
            for sample, our, cpu in answers
            if our != cpu
        ]
        right = sum(our in sample.references for sample, our, _ in answers)
        row = {"method": name, "asked": len(samples), "right": right, "identical": 1 - len(differing) / len(samples)}
        rows.append(row | {"wanted": WANTED, "differing": differing})
    record = {"geometry": "the embedded model", "machine": machine(torch.device(device)), "dtype": "float32"}
    return record | {"rows": rows}


def _answers(vlm: VLM, questions: list[Question], pruner: Pruner) -> Iterator[str]:
    with attach(vlm.model, pruner), torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        for first in range(0, len(questions), BATCH):
            inputs = vlm.encode(questions[first : first + BATCH])
            yield from (answer.text for answer in vlm.generate(inputs, TASKS["pico"].max_new_tokens))


def _of_tests(name: str) -> Any:
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return __import__(name)


def _moved(model: Any, device: torch.device) -> Any:
    return copy.deepcopy(model).to(device, torch.bfloat16)


def _placed(sample: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {
        name: tensor.to(device, torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in sample.items()
    }


def _position(places: Tensor | None) -> dict[str, Tensor]:
    return {} if places is None else {"position_ids": places[..., -1:]}


def _error(got: Float[Tensor, "*position vocab"], expected: Float[Tensor, "*position vocab"]) -> float:
    """The difference, as a share of what is expected, both by their norm."""
    return float((got.float() - expected.float()).norm() / expected.float().norm())
