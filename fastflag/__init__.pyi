# What type checkers and editors see of __init__.py, whose names come when they are first used.
from fastflag.api import Backtest as Backtest
from fastflag.api import Decision as Decision
from fastflag.api import Examination as Examination
from fastflag.api import InputError as InputError
from fastflag.api import MemoryPlan as MemoryPlan
from fastflag.api import Metrics as Metrics
from fastflag.api import Run as Run
from fastflag.api import doctor as doctor
from fastflag.api import forget_proofs as forget_proofs
from fastflag.api import load as load
from fastflag.api import metrics as metrics
from fastflag.api import open as open
from fastflag.api import plan as plan
from fastflag.api import prove as prove
from fastflag.api import train as train

__version__: str
