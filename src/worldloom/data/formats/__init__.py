"""Formats that others use, one file each; `convert` carries episodes from any of them to any that can be written.

What a format needs beyond this library (h5py, minari ...) is imported when it is used.
"""

import importlib
import pkgutil

from worldloom.data.formats.base import FORMATS, Format, Note, ReadOptions, Sink, Source, WriteOptions
from worldloom.data.formats.convert import ConversionReport, NoteGroup, convert, detect

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
