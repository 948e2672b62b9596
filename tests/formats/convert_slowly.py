"""Run by a test, which kills it: converts with a commit for every second episode, and takes its time."""

import sys

from format_samples import SplitFormat

from worldloom.formats import FORMATS, WriteOptions, convert, store

if __name__ == "__main__":
    source, target, target_format, delay = sys.argv[1:]
    store.StoreSink.most_episodes = 2
    FORMATS.register("split")(SplitFormat(delay=float(delay)).format)
    print("ready", flush=True)
    convert(source, target, source_format="split", target_format=target_format, write=WriteOptions(lossless=True))
