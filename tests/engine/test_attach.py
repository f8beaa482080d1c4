"""What a session leaves behind (nothing), what it works with, and what it refuses."""

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from vlmflow import FastV, HiMAP, PyramidDrop, Uniform, attach, prune
from vlmflow.engine import session

HIMAP = HiMAP(k1=2, r1=0.5, k2=4, r2=0.5)
NEW = 5


def fingerprint(model):
    """Everything that an attachment could leave: attributes, hooks, configs of every module."""
    return {
        name: (type(module), set(vars(module)), id(vars(module).get("config")), hook_counts(module))
        for name, module in model.named_modules()
    }


def hook_counts(module):
    return tuple(len(value) for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict))


def configs(model):
    return [id(vars(module).get("config")) for module in model.modules()]


def generate(model, batch):
    return model.generate(**batch, max_new_tokens=NEW, do_sample=False)


@pytest.fixture(scope="module")
def llava():
    return tiny.build("llava")


@pytest.fixture
def own():
    """A model that the test may change."""
    return copy.deepcopy(tiny.build("llava").model)


@pytest.fixture(scope="module")
def batch(llava):
    return llava.collate(llava.samples)


@pytest.fixture(scope="module")
def expected(llava, batch):
    with prune(llava.model, HIMAP):
        return generate(llava.model, batch)


class TestLeavesNothing:
    """Law 7."""

    def test_after_use(self, llava, batch):
        answer, before = (
            generate(llava.model, batch),
            fingerprint(llava.model),
        )  # transformers adds hooks at first use
        with prune(llava.model, HIMAP):
            generate(llava.model, batch)
            assert fingerprint(llava.model) != before
        assert fingerprint(llava.model) == before
        assert torch.equal(generate(llava.model, batch), answer)

    @pytest.mark.parametrize("pruner", [HIMAP, PyramidDrop(layers=(2, 4))], ids=repr)
    @pytest.mark.parametrize("where", ["self_attn.q_proj", "self_attn.o_proj", "mlp"])
    def test_after_an_exception_in_a_layer(self, own, llava, batch, expected, pruner, where):
        before, before_configs = fingerprint(own), configs(own)

        def fail(*_):
            raise KeyError("on purpose")

        layer = own.model.language_model.layers[1 if pruner is HIMAP else 2]
        handle = layer.get_submodule(where).register_forward_hook(fail)
        with prune(own, pruner):
            with pytest.raises(KeyError, match="on purpose"):
                own(**batch)
            handle.remove()
            assert configs(own) == before_configs
            if pruner is HIMAP:
                assert torch.equal(generate(own, batch), expected)  # the next call is none the worse
        assert fingerprint(own) == before

    def test_after_an_exception_before_the_text_model(self, llava, batch, expected):
        with prune(llava.model, HIMAP):
            with pytest.raises((ValueError, RuntimeError)):
                llava.model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
            assert torch.equal(generate(llava.model, batch), expected)

    def test_detach(self, llava, batch):
        before = fingerprint(llava.model)
        handle = attach(llava.model, HIMAP)
        generate(llava.model, batch)
        handle.detach()
        handle.detach()
        assert fingerprint(llava.model) == before
        assert len(handle.trace.kept[5]) == len(llava.samples)

    def test_two_models_at_once(self, llava, batch, expected):
        other = tiny.build("qwen2_5_vl")
        with prune(llava.model, HIMAP) as first, prune(other.model, FastV()) as second:
            assert torch.equal(generate(llava.model, batch), expected)
            generate(other.model, other.collate(other.samples))
        assert first.image_tokens != second.image_tokens

    @pytest.mark.parametrize("pruner", [HIMAP, PyramidDrop(layers=(2, 4))], ids=repr)
    def test_the_trace_keeps_no_cache_mask_or_feature(self, pruner):
        """They go with the call, while its trace can still be read."""
        small, seen = tiny.build("qwen3_vl"), {}
        batch, text = small.collate(small.samples), small.model.model.language_model

        def note(name, values):
            seen.setdefault(name, []).extend(map(weakref.ref, values))

        def note_text(module, args, kwargs):
            note("feature", kwargs.get("deepstack_visual_embeds") or [])

        def note_layer(module, args, kwargs):
            note("mask", [kwargs["attention_mask"]])
            note("cache", [kwargs["past_key_values"], *kwargs["past_key_values"].layers])

        handles = [text.register_forward_pre_hook(note_text, with_kwargs=True)]
        with prune(small.model, pruner) as trace:
            handles += [layer.register_forward_pre_hook(note_layer, with_kwargs=True) for layer in text.layers]
            out = small.model.generate(**batch, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
            note("slots", [layer.vlmflow_slots for layer in out.past_key_values.layers[-2:]])
        for handle in handles:
            handle.remove()
        del out
        gc.collect()
        assert all(seen[name] for name in ("feature", "mask", "cache", "slots"))
        assert [name for name, refs in seen.items() if any(ref() is not None for ref in refs)] == []
        assert [len(kept) for kept in trace.kept[5]] == list(trace.image_tokens[5])

    def test_decoding_keeps_as_many_tensors_after_twenty_steps_as_after_five(self, llava, batch):
        """Padded ones: of the masks of earlier steps, and what was made of them, none is left."""
        mask, alive = batch["attention_mask"], []
        with prune(llava.model, HIMAP), torch.no_grad():
            out = llava.model(**batch, use_cache=True)
            for steps in (5, 15):
                for _ in range(steps):
                    token = out.logits[:, -1:].argmax(-1)
                    mask = torch.cat([mask, torch.ones_like(token)], 1)
                    out = llava.model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
                gc.collect()
                alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        assert alive[0] == alive[1]

    def test_nothing_is_kept_alive(self, batch):
        model = copy.deepcopy(tiny.build("llava").model)
        with prune(model, HIMAP):
            generate(model, batch)
        attached = len(session._attached)
        del model
        gc.collect()
        assert len(session._attached) == attached


def test_unpruned_layers_have_no_hook(llava):
    layers = llava.model.model.language_model.layers
    with prune(llava.model, FastV(k=4)):
        hooked = [len(layer._forward_pre_hooks) for layer in layers]
    assert hooked == [0, 0, 0, 1, 1, 1]


def test_without_pruner_only_the_trace(llava, batch):
    with attach(llava.model) as trace:
        answer = generate(llava.model, batch)
    assert torch.equal(answer, generate(llava.model, batch))
    assert trace.image_tokens[0] == trace.image_tokens[5]
    with pytest.raises(RuntimeError, match="no prompt"), attach(llava.model) as empty:
        _ = empty.layout


# transformers before 5.23 asks an offloaded model's first weight, which is nowhere, where the model is
offloaded = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type")


class TestWorksWith:
    def test_lora(self, own, batch, expected):
        lora = peft.get_peft_model(own, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
        with prune(lora, HIMAP) as trace:
            assert torch.equal(generate(lora, batch), expected)  # LoRA starts as the identity
        assert trace.kv_lengths[-1] < trace.kv_lengths[0]

    @offloaded
    def test_offloaded(self, own, batch, expected):
        accelerate.cpu_offload(own, execution_device=tiny.DEVICE)
        with prune(own, HIMAP):
            assert torch.equal(generate(own, batch), expected)

    @offloaded
    def test_offloaded_after_attaching(self, own, batch):
        with prune(own, PyramidDrop(layers=(2, 4))):
            answer = generate(own, batch)
            accelerate.cpu_offload(own, execution_device=tiny.DEVICE)
            assert torch.equal(generate(own, batch), answer)

    @offloaded
    def test_disk_offloaded(self, own, batch, expected, tmp_path):
        accelerate.disk_offload(own, offload_dir=tmp_path, execution_device=tiny.DEVICE)
        with prune(own, HIMAP):
            assert torch.equal(generate(own, batch), expected)

    def test_inference_mode(self, llava, batch, expected):
        with prune(llava.model, HIMAP), torch.inference_mode():
            assert torch.equal(generate(llava.model, batch), expected)

    @pytest.mark.parametrize("pruner", [HIMAP, PyramidDrop(layers=(2, 4))], ids=repr)
    def test_bfloat16(self, own, llava, pruner):
        own.to(torch.bfloat16)
        sample = dict(llava.samples[0])
        sample["pixel_values"] = sample["pixel_values"].bfloat16()
        with prune(own, pruner) as trace, torch.no_grad():
            logits = own(**sample).logits
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()
        assert trace.image_tokens[-1][0] < trace.image_tokens[0][0]

    def test_autocast(self, llava):
        with (
            prune(llava.model, HIMAP) as trace,
            torch.no_grad(),
            torch.autocast(llava.model.device.type, torch.bfloat16),
        ):
            logits = llava.model(**llava.samples[0]).logits
        assert logits.isfinite().all()
        assert trace.image_tokens[-1][0] < trace.image_tokens[0][0]

    def test_logits_keep_their_length(self, llava, batch):
        with prune(llava.model, HIMAP), torch.no_grad():
            out = llava.model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
        assert out.logits.shape[1] == batch["input_ids"].shape[1]
        assert out.loss.isfinite()

    def test_a_taught_answer_has_no_say(self, llava):
        """With labels, only the prompt ranks: the kept tokens are those of inference."""
        sample = llava.samples[0]
        answer = torch.randint(3, 90, (1, 4), device=tiny.DEVICE)
        ids = torch.cat([sample["input_ids"], answer], 1)
        longer = {**sample, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        labels = torch.cat([torch.full_like(sample["input_ids"], -100), answer], 1)
        with prune(llava.model, HIMAP) as trace, torch.no_grad():
            llava.model(**sample)
            kept = trace.kept[4]
            llava.model(**longer, labels=labels)
            assert torch.equal(trace.kept[4][0], kept[0])

    @pytest.mark.parametrize("pruner", [HIMAP, PyramidDrop(layers=(2, 4))], ids=repr)
    def test_training_with_checkpointing(self, own, batch, pruner):
        """The same loss and gradients with and without gradient checkpointing."""
        own.train()
        labels = batch["input_ids"].masked_fill(batch["input_ids"] >= 90, -100)
        results = []
        for checkpointing in (False, True):
            if checkpointing:
                older = session._CHECKPOINTS_HOOKS
                (own.gradient_checkpointing_enable if older else own.activation_checkpointing_enable)()
            own.zero_grad()
            with prune(own, pruner):
                if checkpointing and session._CHECKPOINTS_HOOKS:
                    with pytest.raises(ValueError, match=r"5\.23"):
                        own(**batch, labels=labels)
                    return
                loss = own(**batch, labels=labels).loss
                loss.backward()
            results.append((loss.detach(), [p.grad.clone() for p in own.parameters() if p.grad is not None]))
        (loss, gradients), (loss_again, gradients_again) = results
        assert torch.equal(loss, loss_again)
        assert len(gradients) == len(gradients_again) > 50
        for one, other in zip(gradients, gradients_again, strict=True):
            torch.testing.assert_close(one, other)

    def test_compiled_decoding(self):
        """Decoding on a pruned static cache compiles to one graph, which serves the next prompt too."""
        run = subprocess.run(
            [sys.executable, "-c", COMPILED], cwd=Path(__file__).parents[1], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == ["True", "True", "1"]


COMPILED = """
import tiny, torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache
from vlmflow import HiMAP, prune

small, counter = tiny.build("llava"), CompileCounter()
model, step = small.model, torch.compile(small.model.forward, backend=counter, fullgraph=True)
cache = StaticCache(config=model.config, max_cache_len=96)
with prune(model, HiMAP(2, 0.5, 4, 0.5)), torch.no_grad():
    for batch in small.collate(small.samples[:2]), small.collate(small.samples[1:3]):
        expected = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
        mask = batch["attention_mask"]
        position = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(**batch, position_ids=position, past_key_values=cache, use_cache=True)
        tokens = [out.logits[:, -1:].argmax(-1)]
        for number in range(2):
            mask = torch.cat([mask, torch.ones_like(tokens[0])], 1)
            whole = torch.nn.functional.pad(mask, (0, 96 - mask.shape[1]))
            position = mask.sum(1, keepdim=True) - 1
            out = step(input_ids=tokens[-1], attention_mask=whole, position_ids=position, past_key_values=cache)
            tokens.append(out.logits[:, -1:].argmax(-1))
        print(torch.equal(torch.cat(tokens, 1), expected))
        cache.reset()
print(counter.frame_count)
"""


class TestRefuses:
    def test_a_second_session(self, llava):
        with prune(llava.model, HIMAP), pytest.raises(ValueError, match="already has a session"):
            attach(llava.model, HIMAP)
        with prune(llava.model, HIMAP):
            pass

    def test_a_compiled_model(self, own):
        with pytest.raises(ValueError, match="compiled"):
            attach(torch.compile(own), HIMAP)
        own.compile()
        with pytest.raises(ValueError, match="compiled"):
            attach(own, HIMAP)

    def test_data_parallel(self, own):
        with pytest.raises(ValueError, match=r"is wrapped in nn.DataParallel; attach to the model inside"):
            attach(nn.DataParallel(own), HIMAP)

    def test_a_text_model(self):
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2
        )
        with pytest.raises(TypeError, match="no image token id"):
            attach(LlamaForCausalLM(config), HIMAP)

    def test_no_transformers_model(self):
        with pytest.raises(TypeError, match="wanted a Hugging Face transformers model, got Linear"):
            attach(nn.Linear(2, 2), HIMAP)

    @pytest.mark.parametrize(
        ("family", "reason"),
        [
            ("Mllama", "is not supported: its images do not stand in the sequence"),
            ("Qwen3_5", "layers 0 to 1 of this model are recurrent"),
        ],
    )
    def test_architectures_that_would_go_wrong(self, family, reason):
        if not hasattr(transformers, f"{family}Config"):
            pytest.skip(f"this transformers has no {family}")
        with torch.device("meta"):
            config = getattr(transformers, f"{family}Config")()
            model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        with pytest.raises((TypeError, ValueError), match=reason):
            attach(model, HIMAP)

    def test_tensor_parallel_models(self, own, monkeypatch):
        monkeypatch.setattr(type(own), "tp_size", 2)
        with pytest.raises(ValueError, match="split over 2 devices"):
            attach(own, HIMAP)

    def test_a_pruner_too_deep(self, llava):
        with pytest.raises(ValueError, match="layers 1 to 5"):
            attach(llava.model, HiMAP(k1=2, k2=8))
        with prune(llava.model, HIMAP):  # the refused session holds nothing
            pass

    @pytest.mark.parametrize("pruner", [HIMAP, FastV(k=2), PyramidDrop(layers=(2, 4))], ids=repr)
    def test_no_question(self, llava, pruner):
        """Asked of every sample: here the last one has none. Who ranks by no text may go on."""
        batch = llava.collate([llava.sample([5, "image", 3]), llava.sample([5, "image"])])
        for inputs in (batch, llava.sample([5, "image"])):
            with prune(llava.model, pruner), pytest.raises(ValueError, match="question behind the last image"):
                llava.model(**inputs)
            with prune(llava.model, Uniform(k=2)) as trace:
                llava.model(**inputs)
            assert trace.image_tokens[5] < trace.image_tokens[0]

    def test_kept_by_a_slice_of_layers(self, llava, batch):
        with prune(llava.model, HIMAP) as trace:
            llava.model(**batch)
        first, second = trace.kept[3:5]
        assert [len(places) for places in first] == list(trace.image_tokens[3])
        assert [len(places) for places in second] == list(trace.image_tokens[4])
        assert len(trace.kept[1:]) == len(trace.kept) - 1 == 5

    def test_flex_attention(self, own):
        own.model.language_model.config._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match="flex_attention, whose block masks cannot be narrowed; load it with attn"):
            attach(own, HIMAP)

    def test_a_mask_of_another_kind(self, llava):
        """As flex attention's block masks are."""
        sample = llava.samples[0]
        with prune(llava.model, HIMAP), pytest.raises(ValueError, match="cannot read an attention mask of type list"):
            llava.model(**{**sample, "attention_mask": sample["attention_mask"].tolist()})

    def test_a_trace_of_nothing(self, llava):
        with prune(llava.model, HIMAP) as trace:
            for look in (trace.cost, lambda: trace.kept, lambda: trace.image_tokens):
                with pytest.raises(RuntimeError, match="no prompt has been read yet; run the model inside"):
                    look()

    def test_static_sliding_cache(self):
        small = tiny.build("gemma3_window")
        with prune(small.model, HIMAP), pytest.raises(ValueError, match="dynamic cache"):
            small.model.generate(
                **small.samples[0], max_new_tokens=2, cache_implementation="static", disable_compile=True
            )

    def test_a_crop_into_the_pruned_image(self, llava):
        sample = llava.samples[0]
        with prune(llava.model, HIMAP), torch.no_grad():
            cache = llava.model(**sample, use_cache=True).past_key_values
            length = sample["input_ids"].shape[1]
            question = int((sample["input_ids"][0] == tiny.IMAGE).nonzero().max()) + 1
            cache.crop(-(length - question + 3))
            with pytest.raises(RuntimeError, match="cropped back"):
                llava.model(input_ids=sample["input_ids"][:, -4:], past_key_values=cache)
