"""Models and tokenizers: found, checked, loaded once, quantised on the way (`load.py`); instance changes (`surgery.py`)."""

from thriftune.models.files import find_model_folder, weight_files
from thriftune.models.load import LoadedModel, describe_model, load_model, load_tokenizer

__all__ = ["LoadedModel", "describe_model", "find_model_folder", "load_model", "load_tokenizer", "weight_files"]
