"""Names whose results differ from run to run: clocks, entropy, environment, the terminal.

They are matched by the name a thing has where it is defined, so that `from time import time as
now` is found as well. Generators that a program can seed are not listed: whether a run advanced
a global one is seen at run time (`purity`).
"""

from __future__ import annotations

_CLOCKS = (
    "time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter",
    "time.perf_counter_ns", "time.process_time", "time.process_time_ns", "time.thread_time",
    "time.localtime", "time.gmtime", "time.ctime", "time.strftime", "timeit.default_timer",
    "datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today",
    "datetime.date.today", "pandas.Timestamp.now", "pandas.Timestamp.today",
    "pandas.Timestamp.utcnow", "pandas._libs.tslibs.timestamps.Timestamp.now",
    "pandas._libs.tslibs.timestamps.Timestamp.today",
    "pandas._libs.tslibs.timestamps.Timestamp.utcnow",
)  # fmt: skip
_ENTROPY = (
    "os.urandom", "posix.urandom", "os.getrandom", "posix.getrandom", "secrets", "uuid.uuid1",
    "uuid.uuid4", "random.SystemRandom", "ssl.RAND_bytes", "torch.random.seed", "torch.seed",
)  # fmt: skip
_ENVIRONMENT = (
    "os.environ", "os.environb", "os.getenv", "os.getenvb", "posix.environ", "sys.argv",
    "sys.stdin", "builtins.input", "getpass", "os.getcwd", "posix.getcwd", "pathlib.Path.cwd",
    "pathlib.Path.home", "socket.gethostname", "_socket.gethostname", "platform.node",
    "posixpath.expandvars", "posixpath.expanduser",
)  # fmt: skip
# Unseeded when called with nothing, or None, in the parentheses.
_GENERATORS = (
    "numpy.random.default_rng", "numpy.random._generator.default_rng", "random.Random",
    "numpy.random.RandomState", "numpy.random.mtrand.RandomState", "numpy.random.SeedSequence",
    "numpy.random.bit_generator.SeedSequence", "random.seed", "random.Random.seed",
    "numpy.random.seed", "numpy.random.mtrand.RandomState.seed", "numpy.random.PCG64",
    "numpy.random._pcg64.PCG64",
)  # fmt: skip

# Last parts of names that set a generator which all threads share.
_SEEDING = frozenset({
    "manual_seed", "manual_seed_all", "fork_rng", "seed", "set_seed", "seed_everything",
    "set_rng_state", "set_rng_state_all", "setstate", "set_state", "isolate_rng",
})  # fmt: skip

_BY_NAME = (
    dict.fromkeys(_CLOCKS, "a clock")
    | dict.fromkeys(_ENTROPY, "entropy")
    | dict.fromkeys(_ENVIRONMENT, "the environment")
)


def reasons(name: str, *, called_without_arguments: bool) -> list[str]:
    """Return why a reached name makes results differ from run to run; empty if it does not.

    Args:
        name: Where the thing is defined, as in `numpy.random._generator.default_rng`.
        called_without_arguments: It is called with nothing in the parentheses.
    """
    steps = name.split(".")
    for length in range(1, len(steps) + 1):
        prefix = ".".join(steps[:length])
        if prefix in _BY_NAME:
            return [f"{name} reads {_BY_NAME[prefix]}"]
        if prefix in _GENERATORS and length == len(steps) and called_without_arguments:
            return [f"{name}() is an unseeded generator"]
    return []


def combined_reasons(reached: set[str]) -> list[str]:
    """Return what only shows when all reached names are seen together."""
    forks = {"torch.random.fork_rng", "torch.fork_rng"} & reached
    seeds = {"torch.random.manual_seed", "torch.manual_seed"} & reached
    if forks and not seeds:
        # The state is put back afterwards, so that no check at run time sees the draw.
        return ["torch.random.fork_rng without torch.manual_seed draws from the global generator"]
    return []


def seeds_globally(reached: set[str]) -> bool:
    """Tell whether code sets global generators, so that nothing may draw from them meanwhile."""
    return any(name.rpartition(".")[2] in _SEEDING for name in reached)
