"""Settings by name."""

from fastflag.config.settings import (
    AlgorithmConfig,
    DataConfig,
    PolicyConfig,
    PromptConfig,
    RolloutConfig,
    SimulatorConfig,
    TrainConfig,
)

PRESETS: dict[str, TrainConfig] = {
    "default": TrainConfig(),
    # As many training days as the paper has, and the last half year of the data held out.
    "demo": TrainConfig(
        data=DataConfig(train="2012-06-04..2012-08-31", test="2012-09-04..2013-03-01"),
        total_timesteps=30 * 256 * 63,
    ),
    # The FLAG-Trader paper, Table 3. Its minibatch of 32 comes as 8 accumulated parts of 4: the
    # gradient is the minibatch's. Its 65 steps an episode exceed the 63 that 64 days allow. It does
    # not say how many layers it trains; bf16 stands for its fp16.
    "paper": TrainConfig(
        data=DataConfig(
            data="investorbench:msft.json",
            train="2020-07-01..2020-09-30",
            test="2020-10-01..2021-05-06",
        ),
        prompt=PromptConfig(layout="paper", account="exact", anonymise=False),
        simulator=SimulatorConfig(fill="next_close", fee_bps=0.0, slippage_bps=0.0, horizon=65),
        policy=PolicyConfig(adaptation="full", trunk_weights="bf16", head="mlp"),
        rollout=RolloutConfig(num_envs=1, num_steps=40),
        algorithm=AlgorithmConfig(
            learning_rate=5e-4,
            layer_learning_rate=5e-4,
            minibatch_size=32,
            ent_coef=0.05,
            kl_coef=0.05,
        ),
        total_timesteps=13_860,
    ),
}
