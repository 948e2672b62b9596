"""OGBench's cube: the seed and the actions decide, the vector tells the truth, the fumbling arm moves the cube."""

import subprocess
import sys
from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest

import worldloom.envs  # noqa: F401 - registers the worlds
from worldloom.core.errors import ConfigError, DataError, EnvironmentFailure
from worldloom.core.types import ActionSpec, Observations
from worldloom.data import POLICIES
from worldloom.envs import rendering
from worldloom.envs.spaces import make_vector_env
from worldloom.evaluation import PROTOCOLS, draw_tasks, open_world

if find_spec("ogbench") is None:  # importing it here would settle what draws before the library does
    pytest.skip("OGBench is not installed", allow_module_level=True)

ACTION = ActionSpec(low=(-1.0,) * 5, high=(1.0,) * 5)
EFFECTOR, GRIPPER, BLOCK = slice(12, 15), 17, slice(19, 22)
PLAY = """
import sys
import gymnasium, numpy as np, worldloom.envs
env = gymnasium.make("worldloom/Cube-v0")
actions = np.random.default_rng(1).uniform(-1, 1, (40, 5)).astype(np.float32)
seen = [env.reset(seed=int(sys.argv[1]))[0], *(env.step(action)[0] for action in actions)]
sys.stdout.write(np.stack(seen).tobytes().hex())
"""


@pytest.fixture(scope="module")
def env():
    env = gymnasium.make("worldloom/Cube-v0")
    yield env
    env.close()


def play(env: gymnasium.Env, seed: int, actions: np.ndarray) -> np.ndarray:
    seen = [env.reset(seed=seed)[0]]
    seen += [env.step(action)[0] for action in actions]
    return np.stack(seen)


def metres(vector: np.ndarray) -> np.ndarray:
    return vector / 10 + np.array([0.425, 0, 0])


def fumble(seeds: list[int], steps: int, world: int | None = None) -> dict[str, np.ndarray]:
    """What is seen, told and done; in one `world` with draws by `seeds`, or in a world for each seed."""
    envs = make_vector_env("worldloom/Cube-v0", len(seeds))
    walker = POLICIES["cube-walk"](ACTION)
    walker.reset([np.random.default_rng(seed) for seed in seeds])
    vector, infos = envs.reset(seed=seeds if world is None else [world] * len(seeds))
    record = {"vector": [vector], "block": [infos["block"]], "effector": [infos["effector"]], "action": []}
    ended = False
    for _ in range(steps):
        action = walker.act(Observations.from_numpy(None, vector))
        vector, _, terminated, truncated, infos = envs.step(action)
        ended |= bool(terminated.any() or truncated.any())
        for name, value in (("vector", vector), ("action", action), *infos.items()):
            if name in record:
                record[name].append(value)
    envs.close()
    assert not ended
    return {name: np.stack(values) for name, values in record.items()}


def test_seed_and_actions_decide_every_bit_whoever_played_before_or_between(env: gymnasium.Env) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (40, 5)).astype(np.float32)
    first = play(env, 3, actions)
    play(env, 4, actions[:7])
    np.testing.assert_array_equal(play(env, 3, actions), first)
    assert not np.array_equal(play(env, 4, actions), first)
    # Copies share the compiled model: steps of one lie between those of another.
    envs = [gymnasium.make("worldloom/Cube-v0") for _ in range(2)]
    envs[0].reset(seed=3)
    envs[1].reset(seed=9)
    mixed = []
    for action in actions:
        mixed.append(envs[0].step(action)[0])
        envs[1].step(-action)
    np.testing.assert_array_equal(np.stack(mixed), first[1:])


def test_a_fresh_process_tells_the_same_story(env: gymnasium.Env) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (40, 5)).astype(np.float32)
    done = subprocess.run([sys.executable, "-c", PLAY, "3"], capture_output=True, text=True, check=True, timeout=120)
    there = np.frombuffer(bytes.fromhex(done.stdout), np.float32).reshape(41, 28)
    np.testing.assert_array_equal(there, play(env, 3, actions))


def test_the_global_generator_neither_matters_nor_is_touched(env: gymnasium.Env) -> None:
    np.random.seed(0)  # noqa: NPY002 - the state that must not matter
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = env.reset(seed=5)[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(env.reset(seed=5)[0], first)


def test_arm_and_cube_begin_where_ogbench_lays_them(env: gymnasium.Env) -> None:
    infos = [env.reset(seed=seed)[1] for seed in range(40)]
    block, effector = (np.stack([info[name] for info in infos]) for name in ("block", "effector"))
    for places, low, high in (
        (block, (0.3, -0.3, 0.019), (0.55, 0.3, 0.021)),
        (effector, (0.25, -0.35, 0.2), (0.6, 0.35, 0.35)),
    ):
        assert (places >= np.array(low) - 1e-3).all()
        assert (places <= np.array(high) + 1e-3).all()
    assert (np.ptp(block[:, :2], axis=0) > (0.15, 0.4)).all()
    assert (np.ptp(effector, axis=0) > (0.2, 0.4, 0.08)).all()


def test_the_vector_says_where_things_are_and_the_action_moves_them(env: gymnasium.Env) -> None:
    vector, info = env.reset(seed=0)
    assert vector.dtype == np.float32
    np.testing.assert_allclose(metres(vector[EFFECTOR]), info["effector"], atol=1e-5)
    np.testing.assert_allclose(metres(vector[BLOCK]), info["block"], atol=1e-5)
    for axis in range(3):
        moved = []
        for sign in (1.0, -1.0):
            before = env.reset(seed=0)[1]["effector"]
            for _ in range(3):
                after = env.step(0.5 * sign * np.eye(5, dtype=np.float32)[axis])[4]["effector"]
            moved.append(float((after - before)[axis]))
        assert moved[0] - moved[1] > 0.03
    env.reset(seed=0)
    closed = [env.step(np.array([0, 0, 0, 0, 1], np.float32))[0] for _ in range(10)][-1]
    opened = [env.step(np.array([0, 0, 0, 0, -1], np.float32))[0] for _ in range(10)][-1]
    assert closed[GRIPPER] > 2
    assert opened[GRIPPER] < 0.5


def test_the_fumbling_arm_pushes_and_lifts_the_cube_and_does_not_lose_it() -> None:
    record = fumble(list(range(12)), 150)
    block = record["block"]
    far = np.linalg.norm(block[25:] - block[:-25], axis=2) > 0.04
    assert 0.15 < far.mean() < 0.7
    assert (block[..., 2] > 0.035).any(axis=0).mean() > 0.15  # lifted in some episodes ...
    assert (np.linalg.norm(np.diff(block, axis=0), axis=2) < 1e-3).mean() > 0.4  # ... and left alone mostly
    assert ((block[..., 0] > 0.25) & (block[..., 0] < 0.62) & (np.abs(block[..., 1]) < 0.36)).mean() > 0.98
    assert np.abs(record["action"]).max() <= 1


def test_the_fumbling_arm_aims_at_nothing(env: gymnasium.Env) -> None:
    # From one start, the cube in the middle, other draws send it to other sides.
    middle = [seed for seed in range(60) if (np.abs(env.reset(seed=seed)[1]["block"][:2] - (0.42, 0)) < 0.05).all()]
    record = fumble(list(range(16)), 100, world=middle[0])
    way = record["block"][-1, :, :2] - record["block"][0, :, :2]
    moved = way[np.linalg.norm(way, axis=1) > 0.02]
    assert len(moved) >= 6
    for axis in range(2):
        assert moved[:, axis].min() < -0.02
        assert moved[:, axis].max() > 0.02


def test_an_episode_of_the_fumbling_arm_depends_on_its_own_seed_alone() -> None:
    together, alone = fumble([5, 6, 7], 30), fumble([6], 30)
    np.testing.assert_array_equal(together["vector"][:, 1], alone["vector"][:, 0])


def test_the_fumbling_arm_reads_two_places_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    vector = generator.normal(size=(50, 28)).astype(np.float32)
    other = generator.normal(size=(50, 28)).astype(np.float32)
    other[:, EFFECTOR], other[:, BLOCK] = vector[:, EFFECTOR], vector[:, BLOCK]
    actions = []
    for seen in (vector, other):
        walker = POLICIES["cube-walk"](ACTION)
        walker.reset([np.random.default_rng(0)])
        actions.append(np.stack([walker.act(Observations.from_numpy(None, row[None])) for row in seen]))
    np.testing.assert_array_equal(*actions)


def test_the_fumbling_arm_says_what_it_cannot_move_or_see() -> None:
    with pytest.raises(ConfigError, match="needs 5 continuous action values .* this environment has 2"):
        POLICIES["cube-walk"](ActionSpec(low=(-1.0, -1.0), high=(1.0, 1.0)))
    with pytest.raises(ConfigError, match="must be at most 1"):
        POLICIES["cube-walk"](ACTION, grasp=0.7, elsewhere=0.7)
    walker = POLICIES["cube-walk"](ACTION)
    walker.reset([np.random.default_rng(0)])
    with pytest.raises(DataError, match=r"12 on, and three from index 19 on; the vector of this environment has 4"):
        walker.act(Observations.from_numpy(None, np.zeros((1, 4), np.float32)))
    with pytest.raises(DataError, match="this environment has 0"):
        walker.act(Observations.from_numpy(np.zeros((1, 8, 8, 3), np.uint8), None))


def test_evaluation_reaches_starts_in_the_middle_of_logs() -> None:
    protocol = PROTOCOLS["cube-25@1"].customise(episodes=4)
    with open_world(protocol, 4) as world:
        tasks, _ = draw_tasks(protocol, "25 steps ahead", world, 0, "here")
        assert max(len(actions) for actions in tasks.before) > 5
        frame = tasks.begin(protocol, "25 steps ahead", world, "again")  # checks the digests of what is seen
        assert frame.observations.vector.shape == (4, 28)


def test_odd_arguments_are_named() -> None:
    for arguments, message in [
        ({"observation": "touch"}, "use one of vector, pixels, both"),
        ({"observation": "pixels", "size": 2}, "8 to 480"),
    ]:
        with pytest.raises(EnvironmentFailure, match=message):
            gymnasium.make("worldloom/Cube-v0", **arguments)


def test_without_ogbench_the_world_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import worldloom.envs.cube

    monkeypatch.setattr(worldloom.envs.cube, "_TEMPLATES", type("Nothing", (), {})())
    monkeypatch.setitem(sys.modules, "ogbench.manipspace.envs.cube_env", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'worldloom\[cube\]'"):
        make_vector_env("worldloom/Cube-v0", 1)


def test_the_world_is_light_until_it_is_made() -> None:
    program = (
        "import sys, worldloom.envs, worldloom.data; sys.exit('mujoco' in sys.modules or 'ogbench' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0


def _draws() -> bool:
    try:
        rendering.choose_gl()
    except EnvironmentFailure:
        return False
    return True


@pytest.mark.skipif(not _draws(), reason="no OpenGL that renders without a display")
def test_the_picture_shows_the_cube_and_follows_it() -> None:
    env = gymnasium.make("worldloom/Cube-v0", observation="both", size=128)
    centres, places = [], []
    for seed in range(8):
        seen, info = env.reset(seed=seed)
        pixels = seen["pixels"].astype(int)
        np.testing.assert_array_equal(env.render(), seen["pixels"])
        red = np.argwhere((pixels[..., 0] > 100) & (pixels[..., 0] > pixels[..., 1:].max(axis=2) * 1.6))
        assert len(red) > 8
        centres.append(red.mean(axis=0))
        places.append(info["block"])
    # The camera looks toward the arm: y of the table runs along columns, x along rows.
    centres, places = np.array(centres), np.array(places)
    assert np.corrcoef(centres[:, 1], places[:, 1])[0, 1] > 0.95
    assert np.corrcoef(centres[:, 0], places[:, 0])[0, 1] > 0.9
    assert env.observation_space["vector"].shape == (28,)
    env.close()


@pytest.mark.skipif(not _draws(), reason="no OpenGL that renders without a display")
def test_simple_meshes_change_the_picture_a_little_and_the_physics_not_at_all() -> None:
    full, simple = (
        gymnasium.make("worldloom/Cube-v0", observation="both", simple_meshes=simple) for simple in (False, True)
    )
    walker = POLICIES["cube-walk"](ACTION)
    walker.reset([np.random.default_rng(0)])
    seen, simpler = full.reset(seed=2)[0], simple.reset(seed=2)[0]
    differences = []
    for _ in range(25):
        np.testing.assert_array_equal(simpler["vector"], seen["vector"])
        differences.append(np.abs(simpler["pixels"].astype(int) - seen["pixels"]).mean())
        action = walker.act(Observations.from_numpy(None, seen["vector"][None]))[0]
        seen, simpler = full.step(action)[0], simple.step(action)[0]
    assert 0 < np.mean(differences) < 1  # of 255
    faces = [env.unwrapped._physics.model.mesh_facenum.sum() for env in (full, simple)]
    assert faces[1] < 0.15 * faces[0]
    full.close()
    simple.close()
