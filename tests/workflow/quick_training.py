"""Overrides of a recipe that make its training take seconds."""

QUICK = [
    "training.steps=4",
    "training.validation_windows=16",
    "training.validation_share=0.2",
    "inverse.steps=4",
    "distance.steps=4",
    "reactive.steps=4",
    "reactive.problems=16",
    'goal_inverse={"steps": 4}',
    'behaviour_prior={"steps": 4}',
    "cloning.steps=4",
    'methods={"random": {"name": "random"}, "tree search": {"name": "plan", "horizon": 2}}',
]
