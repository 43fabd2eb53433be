"""Gymnasium's door: the tasks as environments, registered when this room is imported.

    gymnasium.make("fastflag.gym:FastFLAG/Single-v0", market=market)

No part of training goes through it. An id's rules are frozen: a change of them gets a new number.
"""

import gymnasium

_TASKS = {"Single": "single", "Portfolio": "portfolio"}

for _name, _task in _TASKS.items():
    gymnasium.register(
        id=f"FastFLAG/{_name}-v0",
        entry_point=f"fastflag.gym.env:{_task}",
        vector_entry_point=f"fastflag.gym.vector:{_task}",
    )
