"""What is added up over millions of steps, compiled: advantages along them, and samples alike.

Each sum is taken in the order that NumPy takes it in, so that nothing changes in any bit. NumPy
makes an array of each term first: with 65,536 environments that was most of an update on a GPU.

Shapes: H steps, B environments, N samples, K keys.
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
    """Samples of a key become one. All [N], but sums [K, 5], zeros, to be: weight; mean and spread
    of the advantages; mean and spread of the targets (learn/samples.py)."""
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
def every_action_nb(
    row, valid, target, branches, value, probability, gamma, rows, actions, numbers
):
    """A sample for each action of each valid step that fp32 gives a probability, in the order of
    steps; returns how many.

    row, valid and target [H, B], the rows that steps are in and their values' targets; branches:
    where every action would have led, its reward and whether that ends it, [B, H, A]; value [U] and
    probability [U, A]. Written: rows and actions [N], and numbers [3, N], the weights, r + gamma
    V(s') - V(s), and the targets.
    """
    next_row, reward, terminated = branches
    found = 0
    for step in range(row.shape[0]):
        for b in range(row.shape[1]):
            if not valid[step, b]:
                continue
            here = row[step, b]
            for action in range(probability.shape[1]):
                if not np.float32(probability[here, action]) > 0.0:
                    continue
                after = gamma * value[next_row[b, step, action]]
                after *= 0.0 if terminated[b, step, action] else 1.0
                rows[found], actions[found] = here, action
                numbers[0, found] = probability[here, action]
                numbers[1, found] = reward[b, step, action] + after - value[here]
                numbers[2, found] = target[step, b]
                found += 1
    return found
