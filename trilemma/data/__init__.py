"""From a source to a `Dataset`: built-in sets, pictures, arrays, tables, the hub; split by content."""

from trilemma.data.dataset import Dataset
from trilemma.data.describe import describe_data
from trilemma.data.load import load_data
from trilemma.data.saved import save_dataset

__all__ = ["Dataset", "describe_data", "load_data", "save_dataset"]
