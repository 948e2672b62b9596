"""Names the worlds to Gymnasium; importing `worldloom.envs` is enough."""

import gymnasium

_WORLDS = {
    "worldloom/TwoRoom-v0": "TwoRoom",
    "worldloom/FourRooms-v0": "FourRooms",
    "worldloom/Maze-v0": "Maze",
}


def register_envs() -> None:
    """Register the worlds; a second call does nothing."""
    for env_id, name in _WORLDS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                env_id,
                entry_point=f"worldloom.envs.rooms:{name}Env",
                vector_entry_point=f"worldloom.envs.rooms:{name}VectorEnv",
            )
