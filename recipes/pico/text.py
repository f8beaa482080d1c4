"""The tokenizer and the chat prompt: a byte-fallback BPE in which every word of pico's world is one token."""

from __future__ import annotations

import json
import random
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmflow.pico.questions import CHOICE_LETTERS, KINDS, KNOWLEDGE, PLACES
from vlmflow.pico.scenes import CANVAS, COLOUR_NAMES, COUNTS, NAMES, make_scene

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
SYSTEM = "Answer from the picture."
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{% set said = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set said = messages %}{% set system = '" + SYSTEM + "' %}{% endif %}"
    "{% if system is string %}{{ system }}"
    "{% else %}{% for part in system %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for message in said %}"
    "{{ ' USER: ' if message.role == 'user' else ' ASSISTANT: ' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
EASY_VQA_WORDS = (
    "what is the shape does there a contain in image present not no yes of color "
    "circle rectangle triangle red green blue black gray teal brown yellow"
)
SPACE = "▁"


@cache
def _corpus() -> list[str]:
    """Every word of the world, at the start of a text and after a space, often enough to become one token."""
    rng = random.Random(0)
    words = {
        *NAMES,
        *COLOUR_NAMES,
        *EASY_VQA_WORDS.split(),
        *map(str, range(COUNTS[1] + 1)),
        "none",
        "an",
        "and",
        "shows",
    }
    words |= {*" ".join(KNOWLEDGE).split(), *" ".join(PLACES).split(), *CHOICE_LETTERS, *["USER", "ASSISTANT"]}
    words |= {*SYSTEM.rstrip(".").split()}
    opening = {"Answer", "what", "is", "does"}
    for seed in range(40):
        scene = make_scene("train", seed, CANVAS, COUNTS)
        for kind in KINDS.values():
            if question := kind(rng, scene):
                opening.add(question.text.split()[0])
                words |= {*question.text.translate(str.maketrans("", "", ".,?:")).split()}
                words |= {*question.answer.translate(str.maketrans("", "", ".,?:")).split()}
    return [SPACE + word for word in sorted(words)] + sorted(opening)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; a pure function of the questions."""
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=10**5, min_frequency=1, show_progress=False)
    alphabet = [SPACE, *(chr(code) for code in range(33, 127)), "\n"]
    trained.train_from_iterator([*_corpus(), *alphabet], trainer)
    grown = json.loads(trained.to_str())["model"]
    specials = [PAD, BOS, EOS, IMAGE, "<unk>"]
    tokens = [
        *specials,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(grown["vocab"], key=grown["vocab"].get),
    ]
    core = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [tuple(merge) for merge in grown["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.normalizer = normalizers.Replace(" ", SPACE)
    pattern = rf"{SPACE}?\p{{L}}+|{SPACE}?\p{{N}}+|\n|{SPACE}?[^\p{{L}}\p{{N}}{SPACE}\n]|{SPACE}"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials[:4]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
