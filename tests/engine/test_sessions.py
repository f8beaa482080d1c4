"""A session that does not prune what it was asked to says so; and the trace says of which prompt it is."""

import copy
import threading

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

import tiny
from vlmflow import FastV, HiMAP, PyramidDrop, attach, prune

HIMAP = HiMAP(k1=2, r1=0.5, k2=4, r2=0.5)


@pytest.fixture(scope="module")
def llava():
    return tiny.build("llava")


@pytest.fixture
def copied():
    """A model that the test may change."""
    return copy.deepcopy(tiny.build("llava").model)


def logits(model, sample, **more):
    with torch.no_grad():
        return model(**sample, **more).logits


PARTS = {
    "model": lambda model: model,
    "inner model": lambda model: model.model,
    "text decoder": lambda model: model.model.language_model,
    "layer": lambda model: model.model.language_model.layers[3],
    "attention": lambda model: model.model.language_model.layers[1].self_attn,
}


class TestNothingPrunedIsAnError:
    @pytest.mark.parametrize("part", PARTS)
    def test_compiled_before(self, copied, part):
        part = PARTS[part](copied)
        part.forward = torch.compile(part.forward, backend="eager")
        with pytest.raises(ValueError, match="has been compiled"):
            attach(copied, HIMAP)
        del part.forward
        part.compile(backend="eager")
        with pytest.raises(ValueError, match="has been compiled"):
            attach(copied, HIMAP)

    def test_compiled_code_of_before_is_used_again(self, llava, copied):
        """torch keeps it by the code of ``forward``, and does not look whether hooks have come."""
        sample, text = llava.samples[0], copied.model.language_model
        plain = text.forward
        text.forward = torch.compile(plain, backend="eager")
        logits(copied, sample)
        text.forward = plain
        with prune(copied, HIMAP):
            text.forward = torch.compile(plain, backend="eager")
            with pytest.raises(RuntimeError, match="without its hooks"):
                logits(copied, sample)

    def test_a_decoder_that_hooks_do_not_see(self, llava, copied):
        """The model's text decoder was replaced after attaching."""
        with prune(copied, HIMAP):
            copied.model.language_model = copy.deepcopy(llava.model.model.language_model)
            with pytest.raises(RuntimeError, match="never got them by a call that hooks see"):
                logits(copied, llava.samples[0])

    def test_a_layer_that_hooks_do_not_see(self, llava, copied):
        layers = copied.model.language_model.layers
        with prune(copied, HIMAP):
            layers[2] = copy.deepcopy(llava.model.model.language_model.layers[2])
            with pytest.raises(
                RuntimeError,
                match="layer 2, but that layer was called without its hooks; attach before the model is comp",
            ):
                logits(copied, llava.samples[0])

    def test_embeddings_without_a_sign_of_their_image(self, llava):
        """Made outside the session, features in place of the placeholders."""
        sample = dict(llava.samples[0])
        embeds = merged(llava.model, sample)
        with pytest.warns(UserWarning, match="ends without having pruned anything"), prune(llava.model, HIMAP):
            logits(llava.model, {"inputs_embeds": embeds})

    def test_embeddings_that_the_model_made(self, llava):
        """Their ids were seen on the way: to a forward pass, and to a generation with beams."""
        sample = dict(llava.samples[0])
        with prune(llava.model, HIMAP) as trace:
            expected = logits(llava.model, sample)
            kept = trace.kept[5]
            got = logits(llava.model, {"inputs_embeds": merged(llava.model, sample)})
            assert torch.equal(trace.kept[5][0], kept[0])
            assert trace.input_ids is None
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
            plain = llava.model.generate(**sample, max_new_tokens=4, num_beams=3, do_sample=False)
            mask = sample["attention_mask"]
            out = llava.model.generate(
                inputs_embeds=merged(llava.model, sample), attention_mask=mask, max_new_tokens=4, num_beams=3
            )
        assert torch.equal(plain[:, -4:], out)

    def test_a_text_alone_is_nothing_to_warn_of(self, llava):
        with prune(llava.model, HIMAP) as trace:
            logits(llava.model, llava.sample([6]))
        assert not trace.has_image


@torch.no_grad()
def merged(model, sample):
    """Embeddings with the image's features where its tokens stand, as some callers make them."""
    embeds = model.get_input_embeddings()(sample["input_ids"])
    features = torch.cat(list(model.get_image_features(pixel_values=sample["pixel_values"]).pooler_output))
    return embeds.masked_scatter((sample["input_ids"] == tiny.IMAGE)[..., None], features)


class TestWhatLayersAreTold:
    """What is as long as the prompt is cut, whatever it is called; what cannot be cut is refused by name."""

    @pytest.mark.parametrize(
        ("shape", "cut"), [((1, 37), (1, 18)), ((1, 37, 5), (1, 18, 5)), ((1, 37, 2, 5), (1, 18, 2, 5)), ((3,), (3,))]
    )
    def test_an_argument_nobody_knows(self, llava, shape, cut):
        told = self.told(llava, "odd", torch.arange(torch.Size(shape).numel()).view(shape))
        assert told.shape == cut
        if len(shape) > 1:
            assert (told.reshape(18, -1)[:, 0] // torch.Size(shape[2:]).numel()).tolist() == self.left(llava)

    @pytest.mark.parametrize("value", [torch.zeros(37), torch.zeros(1, 4, 37), [torch.zeros(37, 1)]])
    def test_a_form_that_cannot_be_cut(self, llava, value):
        with pytest.raises(ValueError, match=r"given 'odd' of shape \(.*37.*\)"):
            self.told(llava, "odd", value)

    def told(self, llava, name, value):
        """What a layer behind the first drop of a prompt of 37 tokens gets."""
        sample, got = llava.samples[0], []
        assert sample["input_ids"].shape[1] == 37
        layer = llava.model.model.language_model.layers[3]
        add = layer.register_forward_pre_hook(lambda *call: (call[1], {**call[2], name: value}), with_kwargs=True)
        with prune(llava.model, FastV(k=2, ratio=0.76)):
            note = layer.register_forward_pre_hook(lambda *call: got.append(call[2][name]), with_kwargs=True)
            try:
                logits(llava.model, sample)
            finally:
                add.remove()
                note.remove()
        return got[0]

    def left(self, llava):
        with prune(llava.model, FastV(k=2, ratio=0.76)) as trace:
            logits(llava.model, llava.samples[0])
        image = set(trace.kept[0][0].tolist()) - set(trace.kept[5][0].tolist())
        return [place for place in range(37) if place not in image]

    def test_layers_of_an_unknown_kind(self, copied):
        copied.model.language_model.config.layer_types = ["full_attention"] * 5 + ["odd_attention"]
        with pytest.raises(TypeError, match="layers of the kind odd_attention cannot be told"):
            attach(copied, HIMAP)

    def test_position_ids_stay_where_a_layer_may_read_them(self, llava):
        seen = []
        layer = llava.model.model.language_model.layers[5]
        with prune(llava.model, HIMAP) as trace:
            handle = layer.register_forward_pre_hook(
                lambda *call: seen.append(call[2]["position_ids"]), with_kwargs=True
            )
            logits(llava.model, llava.samples[0])
            handle.remove()
        gone = set(trace.kept[0][0].tolist()) - set(trace.kept[5][0].tolist())
        assert seen[0].tolist() == [[place for place in range(37) if place not in gone]]


class TestTheTrace:
    def test_it_is_of_the_newest_prompt_with_an_image(self, llava):
        first, second = llava.samples[:2]
        with prune(llava.model, HIMAP) as trace:
            logits(llava.model, llava.sample([6]))
            assert not trace.has_image
            logits(llava.model, first)
            logits(llava.model, llava.sample([6]))
            assert trace.input_ids is first["input_ids"]
            worker = threading.Thread(target=logits, args=(llava.model, second))
            worker.start()
            worker.join()
            assert trace.input_ids is second["input_ids"]
            assert trace.layout.image.shape == second["input_ids"].shape

    def test_guidance_is_not_the_prompt(self, llava):
        """Its negative prompt is read by the same model, in the same generation."""
        sample = llava.samples[0]
        negative = torch.tensor([[5, 6, 7]], device=tiny.DEVICE)
        with prune(llava.model, HIMAP) as trace:
            llava.model.generate(
                **sample, max_new_tokens=3, do_sample=False, guidance_scale=2.0, negative_prompt_ids=negative
            )
        assert torch.equal(trace.input_ids, sample["input_ids"])

    @pytest.mark.parametrize("pruner", [HIMAP, PyramidDrop(layers=(2, 4))], ids=repr)
    def test_hidden_states_and_attentions_have_the_shapes_that_are_documented(self, pruner):
        """Each layer's are of the tokens that it saw; the last hidden states are of the whole prompt."""
        small = tiny.build("llava", "eager")
        with prune(small.model, pruner) as trace, torch.no_grad():
            out = small.model(**small.samples[0], output_hidden_states=True, output_attentions=True)
        length = small.samples[0]["input_ids"].shape[1]
        lengths = [count[0] for count in trace.tokens]
        assert [tuple(weights.shape) for weights in out.attentions] == [(1, 4, n, n) for n in lengths]
        assert [states.shape[1] for states in out.hidden_states[1:-1]] == lengths[:-1]
        assert out.hidden_states[0].shape[1] == out.hidden_states[-1].shape[1] == length
        assert out.logits.shape[1] == length


class TestRefusesByFamily:
    """Small models of types whose layers count for themselves (``tests/families`` has the laws of those that work)."""

    def test_llama4_beyond_the_length_at_which_it_counts(self):
        model = llama4()
        ids = torch.tensor([[3] * 5 + [100] * 16 + [4] * 7])
        with prune(model, HIMAP) as trace:
            logits(model, {"inputs_embeds": model.get_input_embeddings()(ids)})
            assert trace.image_tokens[-1] == (4,)
        model.config.text_config.floor_scale = 28
        with prune(model, HIMAP), pytest.raises(ValueError, match="counts positions in what is left from 28 tokens on"):
            logits(model, {"inputs_embeds": model.get_input_embeddings()(ids)})

    def test_ministral_where_its_layers_take_slots_for_positions(self, copied, monkeypatch):
        """As those of transformers 5.0 do."""
        text = copied.model.language_model
        grow = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 28}
        text.config.rope_parameters = {**text.config.rope_parameters, **grow}
        forward = text.layers[0].self_attn.forward
        early = lambda *args, cache_position=None, **kwargs: forward(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(text.layers[0].self_attn, "forward", early)
        ids = torch.tensor([[3] * 5 + [tiny.IMAGE] * 16 + [4] * 7])
        with prune(copied, HIMAP) as trace:
            logits(copied, {"inputs_embeds": copied.get_input_embeddings()(ids[:, :-1])})
            assert trace.image_tokens[-1] == (4,)
            with pytest.raises(ValueError, match=r"left from 28 tokens on, .* or take a newer transformers"):
                logits(copied, {"inputs_embeds": copied.get_input_embeddings()(ids)})

    def test_ministral_with_flash_attention(self, copied):
        text = copied.model.language_model.config
        text._attn_implementation = "flash_attention_2"
        text.rope_parameters = {**text.rope_parameters, "llama_4_scaling_beta": 0.1}
        with pytest.raises(ValueError, match="scales queries by their positions"):
            attach(copied, HIMAP)


def llama4():
    """Its text decoder inside the whole model, small."""
    text = {
        **{name: value for name, value in tiny.TEXT.items() if name != "vocab_size"},
        "vocab_size": 128,
        "num_hidden_layers": 6,
        "intermediate_size_mlp": 128,
        "num_local_experts": 2,
        "head_dim": 16,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 4,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    }
    config = Llama4Config(text_config=text, vision_config=vision, image_token_index=100, pad_token_id=0)
    model = Llama4ForConditionalGeneration(config).eval()
    tiny.randomize(model)
    return model
