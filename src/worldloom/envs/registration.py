"""Registers the environments with Gymnasium when `worldloom.envs` is imported."""

import gymnasium
from gymnasium.envs.registration import load_env_creator

from worldloom.envs.factors import WORLDS

# Environments that need an extra; the class is imported when the environment is created.
_PHYSICS = {
    "worldloom/PushT-v0": "worldloom.envs.pusht:PushTEnv",
    "worldloom/Reacher-v0": "worldloom.envs.mujoco_worlds:ReacherEnv",
    "worldloom/PointMaze-v0": "worldloom.envs.mujoco_worlds:PointMazeEnv",
    "worldloom/PointHazards-v0": "worldloom.envs.point_hazards:PointHazardsEnv",
    "worldloom/Cube-v0": "worldloom.envs.cube:CubeEnv",
    "worldloom/Plant-v0": "worldloom.deploy.link_env:LinkEnv",
}


def register_envs() -> None:
    """Register the environments; a second call does nothing."""
    for world in WORLDS:
        if (env_id := f"worldloom/{world}-v0") not in gymnasium.registry:
            gymnasium.register(
                env_id,
                entry_point="worldloom.envs.rooms:RoomEnv",
                vector_entry_point="worldloom.envs.rooms:RoomsVectorEnv",
                kwargs={"world": world},
            )
    for env_id, entry_point in _PHYSICS.items():
        if env_id not in gymnasium.registry:
            # The environments check themselves; Gymnasium's checker would also render every copy.
            gymnasium.register(env_id, entry_point=entry_point, disable_env_checker=True)


def declares_plant(env_id: str) -> bool:
    """Return whether a registered environment declares that it is not a simulator. The environment is not created."""
    spec = gymnasium.registry.get(env_id)
    if spec is None or not isinstance(spec.entry_point, str):
        return False
    try:
        metadata = getattr(load_env_creator(spec.entry_point), "metadata", {})
    except ImportError:  # creating it says which package is missing
        return False
    return metadata.get("simulator") is False
