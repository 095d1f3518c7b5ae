"""A chat tokenizer and messages that several tests share."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "What is 2 + 2?"}
FOUR = {"role": "assistant", "content": "4, vier, 四 ü"}
FIVE = {"role": "assistant", "content": "5"}


def tokenizer(template=CHATML, eos="<|im_end|>", merges=()):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    core.decoder = decoders.ByteLevel()
    specials = ["</s>", "<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=260 + len(merges), special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(merges, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token="<s>")  # noqa: S106
    made.add_special_tokens({"additional_special_tokens": specials[2:]})
    made.chat_template = template
    return made


TOKENIZER = tokenizer()
