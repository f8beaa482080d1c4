"""The GPU's stages run where there is none, at a size of seconds; and the engine follows the model's device."""

import ast
import copy
import json
import sys
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from bench import gpu, gpu_figures, gpu_proofs, stages
from docs.make import performance
from vlmflow import VTW, FastV, HiMAP, PyramidDrop, Random, Uniform, prune
from vlmflow.core.geometry import GEOMETRIES, Geometry
from vlmflow.pruners import Unpruned
from vlmflow.speed import latency

TESTS = Path(__file__).parents[1]
PRUNERS = [HiMAP(2, 0.5, 4, 0.5), FastV(2, 0.6), PyramidDrop((2, 4), 0.5), VTW(3), Random(2, 0.5), Uniform(2, 0.5)]


def run(folder, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu.py", "--out", str(folder), *arguments])
        stages.main("gpu", gpu.STAGES, gpu.__doc__, gpu.refused)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("performance")
    run(folder, "--dry")
    return folder


def record(files, stage):
    return json.loads((files / f"gpu-{stage}.json").read_text())


@pytest.fixture(scope="module")
def model():
    return gpu_figures.subject("llava-1.5-7b", dry=True)


def test_every_stage_writes_its_file(files):
    assert {path.stem for path in files.iterdir()} == {f"gpu-{stage}" for stage in gpu.STAGES}


def test_laws(files):
    laws = record(files, "laws")
    assert laws["files"]["test_kernels"]["passed"] > 0
    assert laws["failures"] == {}
    checks = record(files, "laws-bfloat16")["checks"]
    assert [check for check in checks if not check["passed"]] == []
    laws = {"keep everything", "knock-out", "cached step", "cache lengths", "batch"}
    assert laws < {check["law"] for check in checks}
    for where in ("llava, sdpa", "qwen2_5_vl, eager"):
        assert laws <= {check["law"] for check in checks if check["where"].startswith(where)}
    assert {stage: record(files, stage)["failed"] for stage in ("laws", "laws-bfloat16", "pico")} == {
        "laws": 0, "laws-bfloat16": 0, "pico": 0,
    }  # fmt: skip


def test_prefill_counts_what_it_asks_of_the_device(files):
    point, work = record(files, "prefill-7b")["points"][0], record(files, "prefill-7b")["work"][0]
    assert point["does_not_fit"] == []
    assert list(point["methods"]) == list(work["methods"])
    assert all(0 < one["issued"] <= one["done"] for one in work["methods"].values())
    assert 0 < work["methods"]["none"]["operations"] < work["methods"]["himap"]["operations"]


def test_pico_answers_as_on_the_cpu(files):
    assert [(row["method"], row["identical"]) for row in record(files, "pico")["rows"]] == [("none", 1), ("himap", 1)]


def test_without_cuda_there_is_nothing_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(tmp_path)
    said = capsys.readouterr().out
    assert "gpu laws: cannot run here: torch sees no CUDA device" in said
    assert "transformers" in said
    assert said.endswith("nothing to run here\n")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_cannot_run_says_why():
    assert gpu.reasons(False, 80 << 30, []) == {}
    small = gpu.reasons(False, 16 << 30, ["peft"])
    assert small.keys() == {"laws", "prefill-13b", "protocols"}
    assert small["prefill-13b"] == "the weights of llava-1.5-13b take 24 GiB, the GPU has 16 GiB"
    assert "peft" in small["laws"]
    assert "laws" in gpu.reasons(True, None, ["pytest"])


def test_the_weights_are_those_of_the_model(model):
    weights = sum(weight.nbytes for weight in model.model.language_model.parameters()) + model.lm_head.weight.nbytes
    norms = sum(weight.nbytes for name, weight in model.model.language_model.named_parameters() if "norm" in name)
    assert gpu.weight_bytes(Geometry.from_config(model.config)) == weights - norms
    assert 12 < gpu.weight_bytes(GEOMETRIES["llava-1.5-7b"]) / 2**30 < 13


def test_a_failing_stage_does_not_keep_the_next_from_running(tmp_path, monkeypatch, capsys):
    def fail(dry):
        raise ValueError("on purpose")

    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="failed: first"):
        stages.main("x", {"first": fail, "second": lambda dry: {}}, "")
    assert [path.name for path in tmp_path.iterdir()] == ["x-second.json"]
    assert "on purpose" in capsys.readouterr().err


def test_what_a_stage_counts_as_failed_ends_in_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path)])
    monkeypatch.setattr(stages, "LIMIT", -1)
    with pytest.raises(SystemExit, match="failed: first"):
        stages.main("x", {"first": lambda dry: {"failed": 3}, "second": lambda dry: {"failed": 0}}, "")
    said = capsys.readouterr().out
    assert "x first: 3 failed" in said
    assert "x second: took longer than the -1 s that a stage may take" in said
    assert {path.name for path in tmp_path.iterdir()} == {"x-first.json", "x-second.json"}


class TestOutOfMemory:
    """A cell that does not fit is a figure."""

    @pytest.fixture
    def limited(self, monkeypatch):
        """No room for the methods of these classes."""

        def limit(*classes):
            real = latency.run

            def limited(model, request, pruner):
                if isinstance(pruner, classes):
                    raise torch.OutOfMemoryError("on purpose")
                return real(model, request, pruner)

            monkeypatch.setattr(gpu_figures, "run", limited)
            return gpu_figures

        return limit

    def test_of_one_method(self, limited, model):
        found = limited(FastV).cell(model, {"himap": PRUNERS[0], "fastv": PRUNERS[1]}, 576, 2, 1, dry=True)
        assert found["does_not_fit"] == ["fastv"]
        assert list(found["methods"]) == ["none", "himap"]

    def test_of_the_unpruned_run(self, limited, model):
        found = limited(Unpruned).cell(model, {"himap": PRUNERS[0]}, 576, 2, 1, new_tokens=2, dry=True)
        assert found["does_not_fit"] == ["none"]
        assert found["methods"] == {}
        assert found["alone"]["himap"]["seconds"]["ttft"] > 0
        whole = page_record(points=[found], work=[], largest=[])
        assert "| none | does not fit |" in performance.gpu_prefill(whole)
        assert "| 2 x 16 | none | does not fit |" in performance.gpu_decode(whole)

    def test_of_all_methods_side_by_side(self, model, monkeypatch):
        """What fitted alone stands alone; of a method that then no longer fits, the first run counts."""
        seen = []
        real = gpu_figures.run

        def limited(model, request, pruner):
            seen.append(type(pruner))
            if seen.count(FastV) > 1:
                full()
            return real(model, request, pruner)

        def full(*_, **__):
            raise torch.OutOfMemoryError("on purpose")

        monkeypatch.setattr(gpu_figures, "run", limited)
        monkeypatch.setattr(stages, "measure", full)
        found = gpu_figures.cell(model, {"himap": PRUNERS[0], "fastv": PRUNERS[1]}, 576, 2, 1, dry=True)
        assert found["does_not_fit"] == []
        assert list(found["alone"]) == ["none", "himap", "fastv"]
        assert seen == [Unpruned, HiMAP, FastV] * 2
        found["name"] = "tiny"
        assert "| tiny | deployed | fastv |" in performance.gpu_protocols(page_record(points=[found]))

    def test_of_what_is_asked_of_the_device(self, monkeypatch):

        def full(*_):
            raise torch.OutOfMemoryError("on purpose")

        monkeypatch.setattr(gpu_figures, "asked_of_device", full)
        monkeypatch.setattr(gpu_figures, "PREFILLS", ())
        found = gpu_figures.prefill(True, "llava-1.5-7b")
        assert [set(work["methods"].values()) for work in found["work"]] == [{None}]
        assert "| himap | does not fit |" in performance.gpu_prefill(page_record(**found))

    def test_other_errors_are_not_hidden(self):
        def fail(error):
            raise error

        attempt = stages.attempt
        assert attempt(lambda: 3) == 3
        assert attempt(lambda: fail(torch.OutOfMemoryError("full"))) is None
        for said in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUBLAS_STATUS_NOT_INITIALIZED"):
            assert attempt(lambda said=said: fail(RuntimeError(said))) is None
        with pytest.raises(RuntimeError, match="shapes"):
            attempt(lambda: fail(RuntimeError("shapes")))

    @pytest.mark.parametrize("most", [0, 1, 3, 6, 11, 14])
    def test_of_the_largest_batch(self, model, monkeypatch, most):
        """Found exactly, whether the cost model says too much or too little."""
        sizes = []

        def limited(_model, request, _pruner):
            sizes.append(len(request.inputs["input_ids"]))
            if sizes[-1] > most:
                raise torch.OutOfMemoryError("on purpose")

        monkeypatch.setattr(gpu_figures, "run", limited)
        found = gpu_figures.largest_batch(model, Unpruned(), 576, dry=True)
        assert sizes[0] == found["computed"] == found["free_bytes"] // found["prompt_bytes"] == 8
        assert (found["ran"], found["too_many"]) == (most, most + 1)
        assert len(sizes) <= gpu_figures.TRIES

    def test_a_prompt_needs_the_caches_so_far_and_one_layer(self):
        geometry, prompt_bytes = Geometry(10, 7, 4, 2, 2, 5, 9), gpu_figures.prompt_bytes
        row, cache = (8 * 10 + 3 * 7) * 2, 2 * 10 * 2  # bytes a token, in two bytes a number
        assert prompt_bytes(geometry, Unpruned(), 100, 2) == 160 * row + 4 * 161 * cache
        assert prompt_bytes(geometry, VTW(1), 100, 2) == 160 * row + 161 * cache  # the first layer is the widest
        late = prompt_bytes(geometry, FastV(1, 0.1), 100, 2)
        assert late == 150 * row + (161 + 3 * 151) * cache  # the last one, as the caches outweigh the lost rows


class TestProofs:
    """What is wrong is seen, counted and told."""

    @pytest.fixture
    def subject(self):
        return gpu_proofs.TinyPair.built("llava", "sdpa", torch.device("cpu"), torch.bfloat16)

    def test_a_key_too_many_in_the_reference(self, subject, monkeypatch):
        proof = gpu_proofs.Proof(subject, FastV(2, 0.6))
        assert gpu_proofs.worst(proof.knocked_out, subject) < gpu_proofs.TOLERANCE
        assert proof.batch() < gpu_proofs.TOLERANCE
        real = gpu_proofs.Proof._dropped

        def one_less(*args):
            return {layer: set(sorted(gone)[:-1]) for layer, gone in real(*args).items()}

        monkeypatch.setattr(gpu_proofs.Proof, "_dropped", one_less)
        assert gpu_proofs.worst(proof.knocked_out, subject) > gpu_proofs.TOLERANCE

    def test_a_sample_of_the_batch_that_is_another(self, subject, monkeypatch):
        real = gpu_proofs.Proof._dropped
        monkeypatch.setattr(gpu_proofs.Proof, "_dropped", lambda self, trace, sample, _: real(self, trace, sample, 0))
        proof = gpu_proofs.Proof(subject, FastV(2, 0.6))
        assert gpu_proofs.checked("batch", "", gpu_proofs.TOLERANCE, proof.batch)["passed"] is False

    def test_a_model_that_cannot_be_built(self):
        (check,) = gpu_proofs.checks_of(gpu_proofs.laws_of, "llava", "no_kernel", torch.device("cpu"), torch.bfloat16)
        assert (check["law"], check["where"], check["passed"]) == ("built", "llava, no_kernel", False)
        assert "no_kernel" in check["reason"]

    def test_an_exception_without_words_and_one_of_many_lines(self):
        assert gpu_proofs.said(ValueError()) == "ValueError: "
        assert gpu_proofs.said(ValueError("backend raised:\n  no Triton")) == "ValueError: backend raised: no Triton"

    def test_nan_is_no_small_error(self, subject):
        errors = iter([0.0, float("nan"), 0.0, 0.0])
        assert gpu_proofs.checked("x", "", 0.1, gpu_proofs.worst, lambda _: next(errors), subject)["passed"] is False

    def test_what_cannot_be_tried_is_no_failure(self, subject, monkeypatch):
        def refuse(*_, **__):
            raise RuntimeError("no Triton")

        monkeypatch.setattr(torch, "compile", lambda model, backend: refuse)
        check = gpu_proofs.checked(
            "compiled beside", "", 1e-4, gpu_proofs.compiled_beside, subject.model, subject.samples[0]
        )
        assert (check["passed"], check["reason"]) == (None, "RuntimeError: no Triton")
        page = performance.bfloat16_laws(page_record(checks=[check], kernels_left_out={"flash": "not installed"}))
        assert page.endswith(
            "Cannot be tried here:\n\n- flash: not installed\n- compiled beside: RuntimeError: no Triton"
        )

    def test_kernels_that_are_not_installed(self):
        reasons = gpu_proofs.installed()
        assert (reasons["sdpa"], reasons["eager"]) == (None, None)
        if not torch.cuda.is_available():
            assert "FlashAttention2" in reasons["flash_attention_2"]

    @pytest.mark.parametrize("code", [0, 1, 2, 5])
    @pytest.mark.parametrize("failed", [False, True])
    def test_pytests_exit_code(self, monkeypatch, failed, code):
        """A code that the report does not explain: the session ended before its tests did."""
        wrong = '<failure message="no"/>' if failed else ""
        case = f'<testsuites><testcase classname="test_kernels" name="test_a">{wrong}</testcase></testsuites>'
        failures = self.laws(monkeypatch, case, code)["failures"]
        assert ("test_kernels::test_a" in failures) == failed
        assert ("pytest" in failures) == (code != failed)

    def test_a_law_file_that_did_not_run(self, monkeypatch):
        found = self.laws(monkeypatch, "<testsuites/>", 0)
        assert found["failures"] == {"test_kernels": "none of its tests ran"}
        assert found["failed"] == 1

    @staticmethod
    def laws(monkeypatch, report, code):
        """The record of a dry run whose pytest left this report and this exit code."""

        def run(command, **how):
            assert how["timeout"] < 480
            path = next(word for word in command if word.startswith("--junitxml="))
            Path(path.partition("=")[2]).write_text(report)
            return CompletedProcess(command, code, stdout="said", stderr="")

        monkeypatch.setattr(gpu_proofs.subprocess, "run", run)
        return gpu_proofs.laws(dry=True)

    def test_pytests_report_is_counted_by_file(self, tmp_path):
        report = tmp_path / "report.xml"
        report.write_text(
            '<testsuites><testsuite><testcase classname="test_laws" name="a"/>'
            '<testcase classname="test_laws" name="b"><failure message="no&#10;trace">...</failure></testcase>'
            '<testcase classname="tests.test_attach.TestX" name="c"><skipped/></testcase>'
            '<testcase classname="" name="tests.test_tap"><error message="collection failure"/></testcase>'
            "</testsuite></testsuites>"
        )
        files, failures = gpu_proofs.counted(report)
        assert files["test_laws"] == {"passed": 1, "failed": 1, "skipped": 0}
        assert files["test_attach"] == {"passed": 0, "failed": 0, "skipped": 1}
        assert files["test_tap"] == {"passed": 0, "failed": 1, "skipped": 0}
        assert failures == {"test_laws::b": "no", "test_tap::tests.test_tap": "collection failure"}

    def test_too_few_of_picos_answers(self, monkeypatch):
        answers = iter([["a", "b"], ["a", "b"], ["a", "b"], ["a", "c"]])  # here and there, unpruned; then pruned
        monkeypatch.setattr(gpu_proofs, "_answers", lambda *_: next(answers))
        found = gpu_proofs.pico(dry=True)
        assert [row["identical"] for row in found["rows"]] == [1, 0.5]
        assert found["failed"] == 1


def test_law_files_make_tensors_where_the_models_are():
    """``VLMFLOW_DEVICE`` may be a GPU. What selects rows of a cache may come from anywhere."""
    makers = {f"torch.{name}" for name in ("arange", "full", "ones", "randint", "randn", "tensor", "zeros")}
    calls = {
        f"{name}, line {call.lineno}: {ast.unparse(call)}"
        for name in gpu_proofs.FILES
        for call in ast.walk(ast.parse(next(TESTS.rglob(f"{name}.py")).read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in makers
    }
    assert {call for call in calls if "device=" not in call and not call.endswith("torch.tensor([0, 2])")} == set()
    assert len(calls) > 10


def test_events_are_sorted_by_name():
    events = {"aten::mm": 3, "cudaLaunchKernel": 2, "cuLaunchKernelEx": 1, "cudaMemcpyAsync": 4, "mm_kernel": 9}
    events |= {"cudaStreamSynchronize": 5, "cudaDeviceSynchronize": 7}
    assert gpu_figures.counted(events) == {"operations": 3, "launches": 3, "copies": 4, "waits": 5}


def page_record(**more):
    """What the page needs of any record."""
    of_any = {"name": "", "geometry": "", "dtype": "", "machine": {"device": ""}, "command": ""}
    return of_any | {"versions": {"torch": "", "transformers": ""}} | more


def test_the_page_says_which_targets_are_met():
    def one(value, low, high, promised=1.0):
        speedup = {"ttft": {"value": value, "low": low, "high": high}}
        return {"seconds": {"ttft": 1.0}, "speedup": speedup, "promised": promised, "peak_bytes": None}

    methods = {"none": one(1, 1, 1), "keep all": one(0.96, 0.9, 0.98), "himap": one(2.8, 2.7, 2.9, 3.0)}
    setting = {"image_tokens": 576, "does_not_fit": []}
    small = setting | {
        "batch": 1,
        "methods": methods | {"fastv": one(1, 0.9, 1.1, 2.0), "vtw": one(0.9, 0.8, 0.95, 2.0)},
    }
    points = [small, setting | {"batch": 8, "methods": methods | {"fastv": one(1.7, 1.6, 1.8, 2.0)}}]
    page = performance.gpu_prefill(page_record(name=performance.TARGETED, points=points, work=[]))
    assert "No sure gain here: fastv." in page
    assert "Slower here: vtw." in page
    assert page.endswith(
        "Targets:\n\n"
        "- at batch 8, at least 90% of what FLOPs promise: missed by fastv at 8 x 576 (85.0%)\n"
        "- at batch 1, keeping all adds at most 3%: missed by keep all at 1 x 576 (4.2%)\n"
        "- nowhere surely slower than unpruned: missed by vtw at 1 x 576 (95.0%)"
    )
    assert performance.targets(points[1:])[1:] == [
        "- at batch 1, keeping all adds at most 3%: not measured",
        "- nowhere surely slower than unpruned: met",
    ]
    assert "Targets" not in performance.gpu_prefill(page_record(points=points, work=[]))


def test_the_page_has_the_gpus_figures(files, tmp_path):
    for path in files.iterdir():
        (tmp_path / path.name).write_text(json.dumps(json.loads(path.read_text()) | {"dry": False}))
    page = "\n".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->" for name in performance.BLOCKS)
    filled = performance.filled(page, tmp_path)
    assert filled.count("Never run") == len(performance.CPU)
    assert "| test_kernels | 4 | 0 | 0 |" in filled
    assert "Batch 1, 16 image tokens:" in filled
    assert "| 3000 | naive |" in filled
    assert performance.filled(page, files).count("Never run") == len(performance.BLOCKS)


# -- the device is the model's: checked on "meta", a device without memory, where any tensor left behind shows


class BetweenDevices(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len({tensor.device.type for tensor in (*args, out) if isinstance(tensor, torch.Tensor)}) > 1:
            self.count[func.overloadpacket] += 1
        return out


@pytest.fixture
def elsewhere(monkeypatch):
    """A model and two unpadded prompts on the device "meta"; and what the engine reads from and writes to it."""
    small = tiny.build("llava")
    samples = [small.sample([10, "image", 27], seed=1), small.sample([5, "image", "image", 7], seed=2)]
    counts, traffic = [[62, 62], [25, 50], [27, 7]], Counter()
    real = torch.tensor

    def read(tensor):
        traffic["read"] += 1
        assert tensor.device.type == "meta"
        assert tensor.shape == (3, 2)
        return counts

    def write(data, *args, device=None, **kwargs):
        made = real(data, *args, device=device, **kwargs)
        traffic["written"] += made.device.type == "meta" and made.numel() > 0
        return made

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    monkeypatch.setattr(torch, "tensor", write)
    ids = torch.cat([sample["input_ids"] for sample in samples]).to("meta")
    return copy.deepcopy(small.model).to("meta"), ids, traffic


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_the_engine_follows_the_models_device(elsewhere, pruner):
    """A prefill reads the device once and writes the quotas, whatever its stages; decoding neither reads nor writes."""
    model, ids, traffic = elsewhere
    with torch.no_grad(), BetweenDevices() as plain:
        model(input_ids=ids)
    written = traffic["written"]
    drawn = isinstance(pruner, Random | Uniform)  # on the host, so that every device keeps the same tokens
    with prune(model, pruner), torch.no_grad():
        with BetweenDevices() as copies:
            out = model(input_ids=ids)
        assert traffic["read"] == 1
        assert traffic["written"] == 2 * written
        assert copies.count.total() - plain.count.total() == 1 + drawn
        before = Counter(traffic)
        with BetweenDevices() as copies:
            model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert out.logits.device.type == "meta"
    assert traffic == before
    assert copies.count == {}
