"""Text to token ids and back: encoding, chat templates, incremental decoding, stop strings.

Everything here is text and plain ints: no requests, no clocks, no tensors. `tokenizers` and `jinja2` are imported when
a tokenizer is loaded or a chat is rendered, never by importing this package.
"""

from semipd.tokenizer.absent import AbsentTokenizer
from semipd.tokenizer.base import Detokenizer, Tokenizer
from semipd.tokenizer.load import load_tokenizer
from semipd.tokenizer.stop import StopMatcher

__all__ = ["AbsentTokenizer", "Detokenizer", "StopMatcher", "Tokenizer", "load_tokenizer"]
