"""The tokenizer files of a model as one object, without torch, and without `transformers` where that can be.

| the folder has                 | what tokenizes                                                                      |
|--------------------------------|-------------------------------------------------------------------------------------|
| tokenizer.json                 | that file, whatever class tokenizer_config.json names: see `load`                   |
| tokenizer.json and tekken.json | tokenizer.json, its words cut by the pattern of tekken.json                         |
| tekken.json alone              | that file                                                                           |
| tiktoken.model alone           | that file, its words cut by a pattern known here by the name of the tokenizer class |
| none of these                  | what `AutoTokenizer` makes of tokenizer.model, vocab.txt, or vocab.json             |

A .gguf file holds its own tokenizer: see `max_ray.gguf.tokenizer`.
"""

from max_ray.tokenization.loading.folder import is_gguf, local_folder, read_json
from max_ray.tokenization.loading.load import load_tokenizer
from max_ray.tokenization.loading.loaded import LoadedTokenizer
from max_ray.tokenization.loading.turn_end import as_ids, turn_end_ids

__all__ = ["LoadedTokenizer", "as_ids", "is_gguf", "load_tokenizer", "local_folder", "read_json", "turn_end_ids"]
