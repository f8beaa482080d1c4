"""Where a prompt ends, and forms of prompt of which image tokens would be dropped wrongly."""

import pytest
import torch
import transformers
from packaging.version import Version

import tiny
from vlmflow import FastV, HiMAP, PyramidDrop, answer_starts, prune

HIMAP = HiMAP(k1=2, r1=0.5, k2=4, r2=0.5)
PRUNERS = [HIMAP, FastV(k=2, ratio=0.5), PyramidDrop(layers=(2, 4))]
pruners = pytest.mark.parametrize("pruner", PRUNERS, ids=repr)


@pytest.fixture(scope="module")
def llava():
    return tiny.build("llava")


def with_answer(sample, length=4):
    """A prompt, its answer behind it, and labels that teach the answer."""
    answer = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(0)).to(tiny.DEVICE)
    ids = torch.cat([sample["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(sample["input_ids"], -100), answer], 1)
    return {**sample, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def padded_right(batch, *others):
    """A batch that is padded on the left, turned; and what belongs to its tokens."""
    order = batch["attention_mask"].sort(stable=True, dim=1, descending=True).indices
    turned = {key: batch[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    return {**batch, **turned}, *(other.gather(1, order) for other in others)


def kept(trace, layer=5):
    """By sample, the numbers of the image tokens that are left, among the sample's own."""
    number = trace.layout.image.cumsum(1) - 1
    return [number[sample, places].tolist() for sample, places in enumerate(trace.kept[layer])]


@pruners
def test_a_batch_padded_on_the_right_keeps_what_its_samples_keep(llava, pruner):
    """As trainers pad: the padding has no say, with labels for the answers, for all text, or none."""
    longer, labels = zip(*(with_answer(sample) for sample in llava.samples[:3]), strict=True)
    batch = llava.collate(list(longer))
    width = batch["input_ids"].shape[1]
    taught = torch.cat([torch.nn.functional.pad(label, (width - label.shape[1], 0), value=-100) for label in labels])
    turned, taught = padded_right(batch, taught)
    whole = turned["input_ids"].masked_fill((turned["attention_mask"] == 0) | (turned["input_ids"] == tiny.IMAGE), -100)
    with torch.no_grad(), prune(llava.model, pruner) as trace:
        alone = []
        for sample in llava.samples[:3]:
            llava.model(**sample)
            alone += kept(trace)
        llava.model(**turned, labels=taught)
        assert kept(trace) == alone
        with_all = []
        for sample in longer:
            llava.model(**sample)
            with_all += kept(trace)
        assert with_all != alone
        llava.model(**turned, labels=whole)
        assert kept(trace) == with_all
        llava.model(**turned)
        assert kept(trace) == with_all


@pruners
def test_a_completion_has_no_say(llava, pruner):
    """By labels, by ``logits_to_keep`` (a number or places), with a cache or without, or where it is said."""
    prompt = llava.samples[0]
    length = prompt["input_ids"].shape[1]
    longer, labels = with_answer(prompt)
    places = torch.arange(length - 1, length + 4)
    with torch.no_grad(), prune(llava.model, pruner) as trace:
        llava.model(**prompt)
        expected = kept(trace)
        llava.model(**longer)
        assert kept(trace) != expected
        for hint in ({"labels": labels}, {"logits_to_keep": 5}, {"logits_to_keep": places}):
            for use_cache in (False, True):
                llava.model(**longer, **hint, use_cache=use_cache)
                assert kept(trace) == expected
        for start in (length, [length], torch.tensor([length])):
            with answer_starts(start):
                llava.model(**longer)
            assert kept(trace) == expected


def test_later_turns_of_a_taught_chat_have_no_say(llava):
    """Nothing behind the first taught token ranks: not the next question either."""
    longer, labels = with_answer(llava.samples[0], length=8)
    labels[:, -4:] = -100
    with torch.no_grad(), prune(llava.model, HIMAP) as trace:
        llava.model(**llava.samples[0])
        expected = kept(trace)
        llava.model(**longer, labels=labels)
    assert kept(trace) == expected


def test_labels_of_image_tokens_take_none_away(llava):
    sample = llava.samples[0]
    with torch.no_grad(), prune(llava.model, HIMAP) as trace:
        llava.model(**sample)
        expected = kept(trace)
        llava.model(**sample, labels=sample["input_ids"])
        assert kept(trace) == expected
        llava.model(**sample, logits_to_keep=sample["input_ids"].shape[1])
        assert kept(trace) == expected


def test_as_many_answers_as_rows(llava):
    batch = llava.collate(llava.samples[:3])
    with prune(llava.model, HIMAP), answer_starts([5, 6]), pytest.raises(ValueError, match="one position, or 3"):
        llava.model(**batch)


class TestRefuses:
    @pytest.fixture
    def packed(self, llava):
        """Two prompts one behind the other in one row."""
        samples = llava.samples[:2]
        ids = torch.cat([sample["input_ids"] for sample in samples], 1)
        pixels = torch.cat([sample["pixel_values"] for sample in samples])
        return {"input_ids": ids, "pixel_values": pixels}, [sample["input_ids"].shape[1] for sample in samples]

    def test_packed_rows_by_their_positions(self, llava, packed):
        inputs, lengths = packed
        position = torch.cat([torch.arange(length) for length in lengths])[None].to(tiny.DEVICE)
        with prune(llava.model, HIMAP), pytest.raises(ValueError, match="packed into one row"):
            llava.model(**inputs, position_ids=position)
        llava.model(**inputs, position_ids=position)

    def test_packed_rows_by_their_lengths(self, llava, packed):
        inputs, lengths = packed
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=tiny.DEVICE)
        with prune(llava.model, HIMAP), pytest.raises(ValueError, match="packed into one row"):
            llava.model(**inputs, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)

    @pytest.mark.parametrize("boolean", [True, False])
    def test_packed_rows_by_their_mask(self, llava, packed, boolean):
        inputs, lengths = packed
        visible = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()[None, None]
        mask = visible if boolean else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        with prune(llava.model, HIMAP), pytest.raises(ValueError, match="packed into one row"):
            llava.model(**inputs, attention_mask=mask.to(tiny.DEVICE))

    def test_positions_that_only_start_late_are_not_packed(self, llava):
        batch = llava.collate(llava.samples)
        position = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
        with torch.no_grad(), prune(llava.model, HIMAP) as trace:
            llava.model(**batch)
            expected = kept(trace)
            llava.model(**batch, position_ids=position)
        assert kept(trace) == expected

    def test_generation_behind_padding(self, llava):
        (turned,) = padded_right(llava.collate(llava.samples[:3]))
        with prune(llava.model, HIMAP), pytest.raises(ValueError, match='padding_side = "left"'):
            llava.model.generate(**turned, max_new_tokens=2)

    @pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.23"),
        reason="transformers itself refuses chunks, or feeds them no image",  # 5.0 and 5.12
    )
    def test_a_chunk_that_cuts_the_question(self, llava):
        sample = llava.sample([5, "image", 30], seed=1)
        with prune(llava.model, HIMAP) as trace:
            expected = llava.model.generate(**sample, max_new_tokens=3, do_sample=False)
            whole = kept(trace)
            with pytest.raises(ValueError, match="prefill_chunk_size cuts the prompt"):
                llava.model.generate(**sample, max_new_tokens=3, do_sample=False, prefill_chunk_size=35)
            length = sample["input_ids"].shape[1]
            out = llava.model.generate(**sample, max_new_tokens=3, do_sample=False, prefill_chunk_size=length)
        assert torch.equal(out, expected)
        assert kept(trace) == whole
