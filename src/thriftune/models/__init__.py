"""Models and tokenizers: loaded and quantised (`load.py`), changed (`surgery.py`); found by `thriftune.model_files`."""

from thriftune.model_files import find_model_folder, local_path, weight_files
from thriftune.models.load import LoadedModel, describe_model, load_model, load_tokenizer

__all__ = [
    "LoadedModel",
    "describe_model",
    "find_model_folder",
    "load_model",
    "load_tokenizer",
    "local_path",
    "weight_files",
]
