"""Episodes: collection, storage, inspection, and sampling of training windows."""

from worldloom.data.cache import load_cache
from worldloom.data.collection import collect, episode_seed, policy_generator
from worldloom.data.cube_expert import CubeExpertOptions
from worldloom.data.cube_walk import CubeWalkOptions
from worldloom.data.dataset import Columns, EpisodeDataset, open_table, table_written
from worldloom.data.frames import Frames, Pixels
from worldloom.data.inspection import inspect
from worldloom.data.layout import (
    FORMAT,
    MissingDataset,
    check_episode,
    compress_frames,
    decode_frames,
    float_list,
    float_lists,
    floats_of,
    lance_errors,
    metadata_json,
)
from worldloom.data.object_walk import ObjectWalkOptions
from worldloom.data.order import SlidingPool
from worldloom.data.pictures import decode_picture, encode_picture, read_picture, resize, room_for
from worldloom.data.policies import POLICIES, infos_for
from worldloom.data.preview import contact_sheet, encode_video, to_rgb, video, write_sheet
from worldloom.data.pusht_expert import PushTExpertOptions
from worldloom.data.reacher_expert import ReacherExpertOptions
from worldloom.data.spec import DatasetSpec
from worldloom.data.statistics import Statistics, compute_statistics
from worldloom.data.streaming import DataConfig, load_frames, stream_frames
from worldloom.data.symmetry import POSITIONS, SquareSymmetry, TurnedPixels, require_square, turn_pictures
from worldloom.data.two_room_expert import TwoRoomExpertOptions
from worldloom.data.validation import Problem, validate
from worldloom.data.variation import require_plausible, require_variation
from worldloom.data.windows import WindowSampler

__all__ = [
    "FORMAT",
    "POLICIES",
    "POSITIONS",
    "Columns",
    "CubeExpertOptions",
    "CubeWalkOptions",
    "DataConfig",
    "DatasetSpec",
    "EpisodeDataset",
    "Frames",
    "MissingDataset",
    "ObjectWalkOptions",
    "Pixels",
    "Problem",
    "PushTExpertOptions",
    "ReacherExpertOptions",
    "SlidingPool",
    "SquareSymmetry",
    "Statistics",
    "TurnedPixels",
    "TwoRoomExpertOptions",
    "WindowSampler",
    "check_episode",
    "collect",
    "compress_frames",
    "compute_statistics",
    "contact_sheet",
    "decode_frames",
    "decode_picture",
    "encode_picture",
    "encode_video",
    "episode_seed",
    "float_list",
    "float_lists",
    "floats_of",
    "infos_for",
    "inspect",
    "lance_errors",
    "load_cache",
    "load_frames",
    "metadata_json",
    "open_table",
    "policy_generator",
    "read_picture",
    "require_plausible",
    "require_square",
    "require_variation",
    "resize",
    "room_for",
    "stream_frames",
    "table_written",
    "to_rgb",
    "turn_pictures",
    "validate",
    "video",
    "write_sheet",
]
