"""Formats of other projects, one file each; `convert` carries episodes from any of them to any writable one.

What a format needs beyond this library (such as h5py) is imported when it is used.
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
