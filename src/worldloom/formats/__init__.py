"""The dataset formats that worldloom reads and writes; `convert` converts episodes between any two of them.

Optional packages that a format needs (such as h5py) are imported on first use.
"""

import importlib
import pkgutil

from worldloom.formats.conversion import ConversionReport, NoteGroup, convert, detect
from worldloom.formats.format import FORMATS, Format, Note, ReadOptions, Sink, Source, WriteOptions

for _module in pkgutil.iter_modules(__path__):  # each registers its formats
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "FORMATS",
    "ConversionReport",
    "Format",
    "Note",
    "NoteGroup",
    "ReadOptions",
    "Sink",
    "Source",
    "WriteOptions",
    "convert",
    "detect",
]
