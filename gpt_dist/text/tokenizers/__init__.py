"""Text to token ids and back: GPT-2's own vocabulary, single characters, or a trained BPE.

    tokenizer = load_tokenizer("gpt2")
    tokenizer.decode(tokenizer.encode("Hello")) == "Hello"

Every tokenizer is saved as one ``tokenizer.json``, in data sets and in checkpoints, and needs
neither the network nor a cache directory.
"""

from gpt_dist.text.gpt2_vocabulary import END_OF_TEXT
from gpt_dist.text.tokenizers.base import FILE_NAME, MAX_VOCAB_SIZE, Tokenizer
from gpt_dist.text.tokenizers.bpe import PADDING, BpeTokenizer
from gpt_dist.text.tokenizers.char import CharTokenizer
from gpt_dist.text.tokenizers.gpt2 import Gpt2Tokenizer
from gpt_dist.text.tokenizers.loading import load_tokenizer
from gpt_dist.text.tokenizers.streaming import StreamDecoder

__all__ = [
    "END_OF_TEXT",
    "FILE_NAME",
    "MAX_VOCAB_SIZE",
    "PADDING",
    "BpeTokenizer",
    "CharTokenizer",
    "Gpt2Tokenizer",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
]
