"""Episodes: collected, stored, looked into, and drawn as training windows."""

from worldloom.data.cache import FrameCache, load_cache
from worldloom.data.collection import collect, episode_seed, policy_generator
from worldloom.data.cube_walk import CubeWalkOptions
from worldloom.data.dataset import Columns, DatasetSpec, EpisodeDataset
from worldloom.data.frames import Frames, Pixels
from worldloom.data.inspection import inspect
from worldloom.data.object_walk import ObjectWalkOptions
from worldloom.data.order import SlidingPool
from worldloom.data.policies import POLICIES
from worldloom.data.preview import contact_sheet, video
from worldloom.data.statistics import Statistics, compute_statistics
from worldloom.data.streaming import DataConfig, StreamedFrames, load_frames
from worldloom.data.validation import Problem, validate
from worldloom.data.windows import LanceWindows, WindowSampler

__all__ = [
    "POLICIES",
    "Columns",
    "CubeWalkOptions",
    "DataConfig",
    "DatasetSpec",
    "EpisodeDataset",
    "FrameCache",
    "Frames",
    "LanceWindows",
    "ObjectWalkOptions",
    "Pixels",
    "Problem",
    "SlidingPool",
    "Statistics",
    "StreamedFrames",
    "WindowSampler",
    "collect",
    "compute_statistics",
    "contact_sheet",
    "episode_seed",
    "inspect",
    "load_cache",
    "load_frames",
    "policy_generator",
    "validate",
    "video",
]
