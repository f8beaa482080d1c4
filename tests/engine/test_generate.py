"""Every way to generate gives the same answer under pruning as plain greedy or beam decoding does."""

import copy
import threading

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import oracles
import tiny
from vlmflow import VTW, FastV, HiMAP, PyramidDrop, prune

HIMAP = HiMAP(k1=2, r1=0.5, k2=4, r2=0.5)
PRUNERS = [HIMAP, FastV(k=2, ratio=0.5), PyramidDrop(layers=(2, 4)), VTW(k=3)]
NEW = 6


def greedy(model, batch, pruner=HIMAP, **kwargs):
    with prune(model, pruner) as trace:
        out = model.generate(
            **batch,
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **kwargs,
        )
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1), trace


@pytest.fixture(scope="module")
def llava():
    return tiny.build("llava")


@pytest.fixture(scope="module")
def ragged(llava):
    return llava.collate(llava.samples)


@pytest.fixture(scope="module")
def plain(llava, ragged):
    return greedy(llava.model, ragged)


def test_pruning_changes_the_answer(llava, ragged, plain):
    """What follows would hold trivially if nothing were pruned."""
    unpruned = llava.model.generate(
        **ragged, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert (torch.stack(unpruned.logits, 1) - plain[1]).abs().max() > 0.1


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_static_cache(llava, ragged, pruner):
    tokens, logits, _ = greedy(llava.model, ragged, pruner)
    again, static_logits, _ = greedy(llava.model, ragged, pruner, cache_implementation="static", disable_compile=True)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, static_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_a_cache_that_grows_layer_by_layer(llava, ragged, pruner):
    """A cache made without a config has no layer yet when the first one is pruned, or run ahead."""
    tokens, logits, _ = greedy(llava.model, ragged, pruner)
    again, grown_logits, _ = greedy(llava.model, ragged, pruner, past_key_values=DynamicCache())
    assert torch.equal(tokens, again)
    assert torch.equal(logits, grown_logits)


def test_static_cache_used_again(llava, plain):
    cache = StaticCache(config=llava.model.config, max_cache_len=96)
    for sample in llava.samples[:2]:
        expected = greedy(llava.model, sample)[0]
        assert torch.equal(expected, greedy(llava.model, sample, past_key_values=cache, disable_compile=True)[0])
        cache.reset()


def test_without_cache(llava):
    """Each step reads the whole text again and ranks anew; so the first token, at least, is the same."""
    for sample in llava.samples[:2]:
        logits = greedy(llava.model, sample)[1]
        again = greedy(llava.model, sample, use_cache=False)[1]
        torch.testing.assert_close(logits[:, 0], again[:, 0], atol=1e-4, rtol=0)


def test_without_cache_content_free(llava):
    """A pruner that does not look at attention prunes the same way each step."""
    sample = llava.samples[0]
    tokens, logits, _ = greedy(llava.model, sample, VTW(k=3))
    again, uncached, _ = greedy(llava.model, sample, VTW(k=3), use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, uncached, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_beams(llava, ragged, pruner):
    """The beams of a batch are those of its samples one by one."""
    beams = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": NEW,
        "return_dict_in_generate": True,
    }
    samples = [llava.samples[0], llava.samples[2]]
    with prune(llava.model, pruner):
        batch = llava.model.generate(**llava.collate(samples), output_scores=True, **beams)
        single = [llava.model.generate(**sample, output_scores=True, **beams) for sample in samples]
    expected = torch.cat([one.sequences[:, -NEW:] for one in single])
    assert torch.equal(batch.sequences[:, -NEW:], expected)
    torch.testing.assert_close(batch.sequences_scores, torch.cat([one.sequences_scores for one in single]))


def test_sampling(llava, ragged):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        with prune(llava.model, HIMAP):
            runs.append(llava.model.generate(**ragged, max_new_tokens=NEW, do_sample=True, num_return_sequences=2))
    assert torch.equal(*runs)
    assert runs[0].shape[0] == 2 * ragged["input_ids"].shape[0]


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_assisted_decoding(llava, pruner):
    """The drafts that the first pass carries behind the prompt have no say in the pruning."""
    sample = llava.samples[0]
    expected, _, greedy_trace = greedy(llava.model, sample, pruner)
    lookup = {"prompt_lookup_num_tokens": 3, "eos_token_id": tiny.END}  # without an end, older ones cannot look up
    with prune(llava.model, pruner) as trace:
        out = llava.model.generate(**sample, max_new_tokens=NEW, do_sample=False, **lookup)
    assert torch.equal(out[:, -NEW:], expected)
    assert torch.equal(trace.kept[5][0], greedy_trace.kept[5][0])


def test_assistant_model(llava):
    sample = llava.samples[0]
    assistant = copy.deepcopy(tiny.build("llava", layers=2).model)
    for pruner in (HIMAP, FastV(k=2, ratio=0.5)):
        expected, _, greedy_trace = greedy(llava.model, sample, pruner)
        with prune(llava.model, pruner) as trace:
            out = llava.model.generate(**sample, max_new_tokens=NEW, do_sample=False, assistant_model=assistant)
        assert torch.equal(out[:, -NEW:], expected)
        assert trace.layout.image.shape[1] > sample["input_ids"].shape[1]  # the first pass carried drafts
        assert torch.equal(trace.kept[5][0], greedy_trace.kept[5][0])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3_window"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_second_turn(family, pruner):
    """A cache handed on to a second turn of text goes on as if the first had not ended."""
    model = tiny.build(family).model
    sample = tiny.build(family).samples[0]
    tokens, logits, _ = greedy(model, sample, pruner)
    cache = DynamicCache(config=model.config)
    with prune(model, pruner):
        first = model.generate(**sample, max_new_tokens=2, do_sample=False, past_key_values=cache)
        text = torch.cat([first, tokens[:, 2:4]], 1)
        mask = torch.ones_like(text)
        out = model.generate(
            input_ids=text,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=NEW - 4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    assert torch.equal(out.sequences[:, -NEW:], tokens)
    torch.testing.assert_close(torch.stack(out.logits, 1), logits[:, 4:], atol=1e-4, rtol=0)


def test_copied_cache(llava):
    """Two answers may branch off one pruned prompt."""
    sample = llava.samples[0]
    _, logits, _ = greedy(llava.model, sample)
    with prune(llava.model, HIMAP), torch.no_grad():
        out = llava.model(**sample, use_cache=True)
        branches = [copy.deepcopy(out.past_key_values) for _ in range(2)]
        token = out.logits[:, -1:].argmax(-1)
        steps = [llava.model(input_ids=token, past_key_values=cache).logits[:, -1] for cache in branches]
    assert torch.equal(*steps)
    torch.testing.assert_close(steps[0], logits[:, 1], atol=1e-4, rtol=0)


def test_expanded_cache(llava):
    """A prompt read once may be continued many times in one batch, and single branches kept."""
    ragged = llava.collate(llava.samples[:2])
    with prune(llava.model, HIMAP), torch.no_grad():
        out = llava.model(**ragged, use_cache=True)
        token, mask = out.logits[:, -1:].argmax(-1), ragged["attention_mask"]
        wide = copy.deepcopy(out.past_key_values)
        wide.batch_repeat_interleave(2)
        narrow = copy.deepcopy(wide)
        narrow.batch_select_indices(torch.tensor([0, 2]))

        def step(cache, repeats):
            longer = torch.cat([mask, torch.ones_like(token)], 1).repeat_interleave(repeats, 0)
            ids = token.repeat_interleave(repeats, 0)
            return llava.model(input_ids=ids, attention_mask=longer, past_key_values=cache).logits[:, -1]

        one = step(out.past_key_values, 1)
        torch.testing.assert_close(step(wide, 2), one.repeat_interleave(2, 0), atol=1e-4, rtol=0)
        torch.testing.assert_close(step(narrow, 1), one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_inputs_embeds(family):
    """Without token ids, images are found by their placeholder's embedding."""
    small = tiny.build(family)
    sample = dict(small.samples[0])
    with torch.no_grad(), prune(small.model, HIMAP) as trace:
        expected = small.model(**sample).logits
        kept = trace.kept[4]
        sample["inputs_embeds"] = small.model.get_input_embeddings()(sample.pop("input_ids"))
        out = small.model(**sample).logits
        if family == "llava":  # without ids, Qwen numbers its positions as if all were text
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
            assert torch.equal(trace.kept[4][0], kept[0])
        assert len(trace.kept[4][0]) == len(kept[0])


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 12),
    reason="transformers itself mixed up the threads' image features",
)
def test_threads(llava):
    """Threads that share an attached model each get their own right answer; the trace says whose prompt it is of."""
    samples = llava.samples
    expected = [greedy(llava.model, sample)[0] for sample in samples]
    answers, failed = {}, []

    def work(number):
        try:
            for _ in range(5):
                out = llava.model.generate(**samples[number], max_new_tokens=NEW, do_sample=False)
                answers.setdefault(number, []).append(out[:, -NEW:])
        except Exception as error:
            failed.append(error)

    with prune(llava.model, HIMAP) as trace:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(samples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert any(torch.equal(trace.input_ids, sample["input_ids"]) for sample in samples)
    assert trace.layout.image.shape == trace.input_ids.shape
    for number in range(len(samples)):
        assert all(torch.equal(answer, expected[number]) for answer in answers[number])


@pytest.mark.parametrize("pruner", [HIMAP, VTW(k=3), PyramidDrop(layers=(2, 4))], ids=repr)
def test_second_turn_with_a_new_image(llava, pruner):
    """The second image is ranked by the second question, on top of what is left of the first."""
    slow = tiny.build("llava", "eager").model
    first, second = llava.sample([4, "image", 6], seed=1), llava.sample([3, "image", 7], seed=2)
    whole = tiny.join(
        [{key: value.T if value.dim() == 2 else value for key, value in s.items()} for s in (first, second)]
    )
    whole = {key: value.T if value.dim() == 2 else value for key, value in whole.items()}
    start = first["input_ids"].shape[1]
    image = (start + (second["input_ids"][0] == tiny.IMAGE).nonzero().flatten()).tolist()
    question = list(range(image[-1] + 1, whole["input_ids"].shape[1]))

    dropped = oracles.drops(slow, first, oracles.kept_sets(pruner, slow, first)[0])
    kept = image
    for stage in pruner.stages(6, len(image)):
        attention = oracles.masked_forward(slow, whole, dropped)[1][stage.scored_layer].mean(0)
        queries = {"question": question, "image": kept, "last": question[-1:], None: []}[stage.queries]
        kept, _ = oracles.largest(kept, attention[queries][:, kept].sum(0).tolist(), stage.keep)
        dropped[stage.layer] = dropped[stage.layer] | (set(image) - set(kept))
    expected = oracles.masked_forward(slow, whole, dropped)[0]

    with prune(llava.model, pruner) as trace, torch.no_grad():
        cache = llava.model(**first, use_cache=True).past_key_values
        out = llava.model(
            input_ids=second["input_ids"],
            pixel_values=second["pixel_values"],
            attention_mask=torch.ones_like(whole["input_ids"]),
            past_key_values=cache,
        )
    assert (trace.kept[5][0] + start).tolist() == kept
    text = ~trace.layout.image[0]
    torch.testing.assert_close(out.logits[0][text], expected[start:][text], atol=1e-4, rtol=0)
    assert [layer.keys.shape[-2] for layer in cache.layers] == list(trace.kv_lengths)
