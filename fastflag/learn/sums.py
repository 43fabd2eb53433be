"""What is added up over millions of steps, compiled: advantages along them, and samples alike.

Each sum is taken in the order that NumPy takes it in, so that nothing changes in any bit. NumPy
makes an array of each term first: with 65,536 environments that was most of an update on a GPU.

Shapes: H steps, B environments, N samples, K slots, W ways, A actions.
"""

import numpy as np

from fastflag.market.compiled.kernel import kernel


@kernel()
def advantages_nb(reward, value, next_value, terminated, truncated, gamma, decay, advantage):
    """All [H, B]; `advantage` is written. The loop over environments is vectorised."""
    steps, environments = reward.shape
    following = np.zeros(environments)
    for step in range(steps - 1, -1, -1):
        for b in range(environments):
            after = gamma * next_value[step, b] * (0.0 if terminated[step, b] else 1.0)
            delta = reward[step, b] + after - value[step, b]
            goes_on = 0.0 if terminated[step, b] or truncated[step, b] else 1.0
            following[b] = delta + decay * goes_on * following[b]
            advantage[step, b] = following[b]


@kernel()
def add_up_nb(key, weight, advantage, advantage_spread, target, target_spread, sums):
    """Samples of a key become one. All [N], but sums [keys, 5], zeros, to be: weight; mean and
    spread of the advantages; mean and spread of the targets (learn/samples.py)."""
    for sample in range(len(key)):
        at = sums[key[sample]]
        at[0] += weight[sample]
        at[1] += weight[sample] * advantage[sample]
        at[3] += weight[sample] * target[sample]
    for place in range(len(sums)):
        if sums[place, 0] > 0.0:
            sums[place, 1] /= sums[place, 0]
            sums[place, 3] /= sums[place, 0]
    for sample in range(len(key)):
        at = sums[key[sample]]
        of_advantage, of_target = advantage[sample] - at[1], target[sample] - at[3]
        at[2] += advantage_spread[sample] + weight[sample] * (of_advantage * of_advantage)
        at[4] += target_spread[sample] + weight[sample] * (of_target * of_target)


@kernel()
def _state_value_nb(rows, value):
    """The value of a state that shows `rows` [K]: the mean of theirs, `value` [U]."""
    total = value[rows[0]]
    for slot in range(1, len(rows)):
        total += value[rows[slot]]
    return total / len(rows)


@kernel()
def every_action_nb(
    row, valid, target, branches, value, probability, gamma, rows, actions, numbers
):
    """A sample for each action of each slot of each valid step that fp32 gives a probability, in
    the order of steps; returns how many.

    row and target [H, B, K], the rows that steps are in and their values' targets; valid [H, B];
    branches: where every action of each slot would have led, [B, H, W, K], its reward and whether
    that ends it, [B, H, W]; value [U] and probability [U, A]. Written: rows and actions [N], and
    numbers [3, N], the weights, r + gamma V(s') - V(s), and the targets.
    """
    next_row, reward, terminated = branches
    slots, names = row.shape[2], probability.shape[1]
    found = 0
    for step in range(row.shape[0]):
        for b in range(row.shape[1]):
            if not valid[step, b]:
                continue
            now = _state_value_nb(row[step, b], value)
            for slot in range(slots):
                here = row[step, b, slot]
                for action in range(names):
                    if not np.float32(probability[here, action]) > 0.0:
                        continue
                    way = slot * names + action
                    after = gamma * _state_value_nb(next_row[b, step, way], value)
                    after *= 0.0 if terminated[b, step, way] else 1.0
                    rows[found], actions[found] = here, action
                    numbers[0, found] = probability[here, action]
                    numbers[1, found] = reward[b, step, way] + after - now
                    numbers[2, found] = target[step, b, slot]
                    found += 1
    return found
