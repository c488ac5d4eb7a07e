"""Whether training would work on a set of machines: from what they are to findings, each with what to do."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ERROR, WARNING, GOOD = "error", "warning", "good"

_FIRST_TORCH, _LAST_TORCH_BEFORE = (2, 11), (2, 15)
_FIRST_MEGATRON, _LAST_MEGATRON_BEFORE = (0, 19, 2), (0, 20)
NCCL_SHARING = (2, 30)  # the first NCCL that takes several ranks on one GPU
_BF16_CAPABILITY = (8, 0)
_VOLTA = (7, 0)
_BUSY = 0.1  # of a GPU's memory, in use before training starts
_SLOW_CLOCK = 0.6  # of the highest clock, while the GPU works
_SLOW_LINK = 1e9  # bytes a second; tokens of a small model alone are as much
_UNEQUAL = 0.5  # of the best link of the same pools


@dataclass(frozen=True)
class Gpu:
    """A process's GPU.

    Attributes:
        name: its kind.
        capability: compute capability, as (8, 6).
        memory, free: bytes, all and free.
        driver: version of the driver; empty where it is not known.
        clock, highest_clock: of the multiprocessors while they work, MHz; 0 where it is not known.
        uuid: tells boards apart; empty where it is not known.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    free: int
    driver: str = ""
    clock: int = 0
    highest_clock: int = 0
    uuid: str = ""


@dataclass(frozen=True)
class Machine:
    """What one process sees.

    Attributes:
        rank: the launcher's.
        node: the machine's name.
        pool: what HETERMOE_POOL says; empty when it is not set.
        python: version.
        packages: version by name; None for one that is not there.
        cuda: the CUDA version that torch was built for; empty for a build without.
        architectures: what that build has kernels for, as ``sm_80`` and ``compute_90``.
        nccl: version of the NCCL that is loaded; empty without.
        gpu: None without one.
        gpu_problem: why there is no GPU though the machine seems to have one; empty otherwise.
        environment: variables that matter here, by name, as far as they are set.
        sees_file: whether the first process's file is in the folder that was given; None when none was.
    """

    rank: int
    node: str
    pool: str = ""
    python: str = ""
    packages: dict[str, str | None] = field(default_factory=dict)
    cuda: str = ""
    architectures: tuple[str, ...] = ()
    nccl: str = ""
    gpu: Gpu | None = None
    gpu_problem: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    sees_file: bool | None = None

    @property
    def group(self) -> str:
        """The pool, or what comes nearest to it: the kind of GPU, or the node."""
        return self.pool or (self.gpu.name if self.gpu else self.node)


@dataclass(frozen=True)
class Transfer:
    """A measured one.

    Attributes:
        source, target: ranks.
        bandwidth: bytes a second.
        backend: nccl or gloo.
    """

    source: int
    target: int
    bandwidth: float
    backend: str


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ERROR when training would fail, WARNING when it would be slow or may fail, GOOD.
        subject: what was looked at.
        where: ranks that it is about; empty for all.
        what: how it is.
        remedy: what to do; empty for GOOD.
    """

    level: str
    subject: str
    what: str
    remedy: str = ""
    where: tuple[int, ...] = ()


def machine_to_document(machine: Machine) -> dict[str, Any]:
    """As JSON has it."""
    return asdict(machine)


def machine_from_document(document: dict[str, Any]) -> Machine:
    """The inverse of ``machine_to_document``, after JSON."""
    gpu = document["gpu"]
    if gpu is not None:
        gpu = Gpu(**{**gpu, "capability": tuple(gpu["capability"])})
    return Machine(**{**document, "gpu": gpu, "architectures": tuple(document["architectures"])})


def diagnose(
    machines: Sequence[Machine], transfers: Sequence[Transfer] = (), failures: Mapping[int, str] | None = None
) -> list[Finding]:
    """What is found, errors first.

    Args:
        machines: all processes, by rank.
        transfers: those that were measured.
        failures: by rank, why it could measure none.
    """
    found = [finding for check in _CHECKS for finding in check(machines)] + list(_links(machines, transfers))
    for rank, failure in (failures or {}).items():
        found.append(Finding(ERROR, "bandwidth", f"ranks cannot talk: {failure}", "set NCCL_SOCKET_IFNAME or "
                             "GLOO_SOCKET_IFNAME to an interface that all nodes have; NCCL_DEBUG=INFO says more", (rank,)))
    return sorted(found, key=lambda finding: (ERROR, WARNING, GOOD).index(finding.level))


# --------------------------------------------------------------------------------------------- one check each


def _python(machines: Sequence[Machine]) -> Iterator[Finding]:
    for version, ranks in _by(machines, lambda one: one.python):
        if _numbers(version) < (3, 12):
            yield Finding(ERROR, "Python", version, "megatron-core needs 3.12 or newer: scripts/setup.sh finds one and "
                          "makes an environment with it", ranks)
        else:
            yield Finding(GOOD, "Python", version, where=ranks)


def _torch(machines: Sequence[Machine]) -> Iterator[Finding]:
    for (version, cuda), ranks in _by(machines, lambda one: (one.packages.get("torch"), one.cuda)):
        if version is None:
            yield Finding(ERROR, "torch", "is not there", "install it: scripts/setup.sh", ranks)
        elif not _FIRST_TORCH <= _numbers(version)[:2] < _LAST_TORCH_BEFORE:
            yield Finding(ERROR, "torch", version, "install one from 2.11 to 2.14, which this package is for", ranks)
        else:
            yield Finding(GOOD, "torch", f"{version}, for {'CUDA ' + cuda if cuda else 'the CPU'}", where=ranks)
    yield from _one_version(machines, "torch", lambda one: one.packages.get("torch"), ERROR,
                            "ranks exchange pickled objects and checkpoints: install one release everywhere; its builds "
                            "(+cu126, +cu130) may differ", build=False)


def _architectures(machines: Sequence[Machine]) -> Iterator[Finding]:
    for (gpu, architectures, cuda), ranks in _by(
        [one for one in machines if one.gpu],
        lambda one: ((one.gpu.name, one.gpu.capability), one.architectures, one.cuda),
    ):
        name, capability = gpu
        word = "sm_%d%d" % capability
        if _runs_on(capability, architectures):
            yield Finding(GOOD, "kernels", f"this torch has kernels for {name} ({word})", where=ranks)
        elif capability <= _VOLTA:
            yield Finding(ERROR, "kernels", f"this torch (CUDA {cuda}) has no kernels for {name} ({word}), but for "
                          f"{', '.join(architectures)}", "install a cu126 build of torch 2.11 to 2.14 on these nodes: "
                          "scripts/setup.sh --cuda cu126; CUDA 13 and torch 2.15 have dropped Volta", ranks)
        else:
            yield Finding(ERROR, "kernels", f"this torch (CUDA {cuda}) has no kernels for {name} ({word}), but for "
                          f"{', '.join(architectures)}", "install a build of torch that has, as of a newer CUDA", ranks)


def _gpus(machines: Sequence[Machine]) -> Iterator[Finding]:
    for problem, ranks in _by([one for one in machines if one.gpu_problem], lambda one: one.gpu_problem):
        yield Finding(ERROR, "GPU", problem, "look with nvidia-smi on the node; a driver older than torch's CUDA needs an "
                      "update, or a build of torch for an older CUDA (scripts/setup.sh --cuda cu126)", ranks)
    kinds = _by([one for one in machines if one.gpu], lambda one: (one.gpu.name, one.gpu.capability, one.gpu.driver))
    for (name, capability, driver), ranks in kinds:
        yield Finding(GOOD, "GPU", f"{name}, capability {capability[0]}.{capability[1]}"
                      + (f", driver {driver}" if driver else ""), where=ranks)
    without = tuple(one.rank for one in machines if not one.gpu and not one.gpu_problem)
    if kinds and without:
        yield Finding(ERROR, "GPU", "none, while other ranks have one", "start these ranks with a GPU (--gpus-per-node, "
                      "CUDA_VISIBLE_DEVICES, --nv of the container), or set HETERMOE_PLATFORM=cpu everywhere", without)
    elif without:
        yield Finding(WARNING, "GPU", "none: training runs on the CPU, for tests and small models",
                      "nothing, if that is meant; otherwise start the ranks with a GPU", without)
    for uuid, ranks in _by([one for one in machines if one.gpu and one.gpu.uuid], lambda one: one.gpu.uuid):
        if len(ranks) > 1:
            yield Finding(WARNING, "GPU", f"one for {len(ranks)} ranks", "start as many ranks on a node as it has GPUs; to "
                          "try a cluster on one GPU, `hetermoe train --emulate` divides it", ranks)


def _precision(machines: Sequence[Machine]) -> Iterator[Finding]:
    """By capability: torch's is_bf16_supported counts what it emulates."""
    with_gpu = [one for one in machines if one.gpu]
    without_bf16 = [one for one in with_gpu if one.gpu.capability < _BF16_CAPABILITY]
    if without_bf16:
        names = ", ".join(sorted({one.gpu.name for one in without_bf16}))
        yield Finding(WARNING, "bf16", f"{names} has none (torch.cuda.is_bf16_supported says otherwise, since it can be "
                      "emulated)", "train with --fp16, which all ranks have, in place of --bf16",
                      tuple(one.rank for one in without_bf16))
    elif with_gpu:
        yield Finding(GOOD, "bf16", "all GPUs have it")


def _nccl(machines: Sequence[Machine]) -> Iterator[Finding]:
    with_gpu = [one for one in machines if one.gpu]
    yield from _one_version(with_gpu, "NCCL", lambda one: one.nccl, ERROR,
                            "communicators need one version everywhere: pip install nvidia-nccl-cu12 or -cu13 in the same "
                            "version on all nodes, or load it with LD_PRELOAD")
    versions = {one.nccl for one in with_gpu}
    if len(versions) == 1:
        version = versions.pop()
        shares = "" if _numbers(version) >= NCCL_SHARING else "; `hetermoe train --emulate` needs %d.%d" % NCCL_SHARING
        yield Finding(GOOD, "NCCL", f"{version} is loaded{shares}") if version else Finding(
            ERROR, "NCCL", "this torch has none", "install a build of torch with NCCL")


def _megatron(machines: Sequence[Machine]) -> Iterator[Finding]:
    for version, ranks in _by(machines, lambda one: one.packages.get("megatron-core")):
        if version is None or not _FIRST_MEGATRON <= _numbers(version) < _LAST_MEGATRON_BEFORE:
            yield Finding(ERROR, "megatron-core", version or "is not there", "pip install 'megatron-core>=0.19.2,<0.20'", ranks)
        else:
            yield Finding(GOOD, "megatron-core", version, where=ranks)
    for name in ("megatron-core", "megatron-hetermoe"):
        yield from _one_version(machines, name, lambda one: one.packages.get(name), ERROR,
                                "all ranks must run the same code: install one version everywhere")


def _extensions(machines: Sequence[Machine]) -> Iterator[Finding]:
    for name, users, without in (
        ("transformer-engine", "all attention ranks", "recipes need --transformer-impl local, and ranks use torch's attention "
         "kernels"),
        ("apex", "all ranks", "recipes need --no-gradient-accumulation-fusion and --no-persist-layer-norm"),
    ):
        if not any(one.gpu for one in machines):
            continue
        versions = _by(machines, lambda one: one.packages.get(name))
        if len(versions) == 1 and versions[0][0] is None:
            yield Finding(WARNING, name, "is nowhere", without)
        elif len(versions) == 1:
            yield Finding(GOOD, name, versions[0][0])
        else:
            yield Finding(WARNING, name, _listed(versions), "flags are the same for all ranks, so a recipe may only use it where "
                          f"{users} have it: else {without}")


def _memory(machines: Sequence[Machine]) -> Iterator[Finding]:
    busy = [one for one in machines if one.gpu and one.gpu.memory - one.gpu.free > _BUSY * one.gpu.memory]
    for one in busy:
        yield Finding(WARNING, "free memory", f"{one.gpu.free / 1e9:.1f} of {one.gpu.memory / 1e9:.1f} GB on {one.node}",
                      "end what else runs there (nvidia-smi names it), or leave the GPU out", (one.rank,))
    if not busy and any(one.gpu for one in machines):
        yield Finding(GOOD, "free memory", "nothing else uses the GPUs")


def _clock(machines: Sequence[Machine]) -> Iterator[Finding]:
    known = [one for one in machines if one.gpu and one.gpu.clock and one.gpu.highest_clock]
    slow = [one for one in known if one.gpu.clock < _SLOW_CLOCK * one.gpu.highest_clock]
    for one in slow:
        yield Finding(WARNING, "clock", f"{one.gpu.clock} of {one.gpu.highest_clock} MHz at work on {one.node}",
                      "look for heat and power limits: nvidia-smi -q -d PERFORMANCE,CLOCK; a profile or plan takes "
                      "GPUs of a pool to be equally fast", (one.rank,))
    if known and not slow:
        yield Finding(GOOD, "clock", "all GPUs work near their highest")


def _connections(machines: Sequence[Machine]) -> Iterator[Finding]:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    values = _by([one for one in machines if one.gpu], lambda one: one.environment.get(name, ""))
    if len(values) > 1:
        yield Finding(WARNING, name, _listed(values), "set it in the recipe's ENV_VARS, so that all ranks have the same")
    for value, _ in values if len(values) == 1 else ():
        yield Finding(GOOD, name, f"is {value}" if value else "is not set; both ways work")


def _shared(machines: Sequence[Machine]) -> Iterator[Finding]:
    answers = [one for one in machines if one.sees_file is not None]
    blind = tuple(one.rank for one in answers if not one.sees_file)
    if blind:
        yield Finding(ERROR, "shared folder", "these ranks do not see what rank 0 wrote", "give --save a folder on a file "
                      "system that all nodes mount (in a container too: its mounts), or a checkpoint is in pieces", blind)
    elif answers:
        yield Finding(GOOD, "shared folder", "all ranks see it")
    elif len({one.node for one in machines}) > 1:
        yield Finding(WARNING, "shared folder", "not looked at", "give --shared-dir with the folder of --save")


def _links(machines: Sequence[Machine], transfers: Sequence[Transfer]) -> Iterator[Finding]:
    groups = {one.rank: one.group for one in machines}
    by_groups: dict[tuple[str, str], list[Transfer]] = defaultdict(list)
    for one in transfers:
        by_groups[groups[one.source], groups[one.target]].append(one)
    for (source, target), group in by_groups.items():
        best = max(one.bandwidth for one in group)
        yield Finding(GOOD, "bandwidth", f"{source} to {target}: {best / 1e9:.2f} GB/s at best over {group[0].backend}")
        for one in group:
            # What gloo reaches between CPUs says nothing of the network that NCCL will use.
            if one.bandwidth < _UNEQUAL * best or (one.backend == "nccl" and one.bandwidth < _SLOW_LINK):
                yield Finding(WARNING, "bandwidth", f"{source} to {target}: {one.bandwidth / 1e9:.2f} GB/s over "
                              f"{one.backend} from rank {one.source} to {one.target}", "tokens cross here twice a layer: "
                              "choose the fast network with NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME or NCCL_IB_HCA; "
                              "NCCL_DEBUG=INFO says which one it takes", (one.source, one.target))


def pairs_to_measure(machines: Sequence[Machine]) -> list[tuple[int, int]]:
    """Ranks between which a transfer tells of the links between pools: both ways between each two pools, so that every
    node takes part, by its first rank."""
    nodes: dict[str, dict[str, int]] = defaultdict(dict)
    for one in machines:
        nodes[one.group].setdefault(one.node, one.rank)
    result = []
    for first, second in itertools.combinations(nodes.values(), 2):
        mine, others = list(first.values()), list(second.values())
        for index in range(max(len(mine), len(others))):
            here, there = mine[index % len(mine)], others[index % len(others)]
            result += [(here, there), (there, here)]
    return result


_CHECKS: tuple[Callable[[Sequence[Machine]], Iterator[Finding]], ...] = (
    _python, _torch, _megatron, _gpus, _architectures, _precision, _nccl, _extensions, _memory, _clock, _connections, _shared,
)


# --------------------------------------------------------------------------------------------- tools


def _by(machines: Sequence[Machine], key: Callable[[Machine], Any]) -> list[tuple[Any, tuple[int, ...]]]:
    """(value, its ranks), in the order in which values appear."""
    result: dict[Any, list[int]] = {}
    for one in machines:
        result.setdefault(key(one), []).append(one.rank)
    return [(value, tuple(ranks)) for value, ranks in result.items()]


def _one_version(machines: Sequence[Machine], subject: str, key: Callable[[Machine], str | None], level: str,
                 remedy: str, build: bool = True) -> Iterator[Finding]:
    """A finding when versions differ; without ``build`` what follows a plus sign does not count."""
    values = _by(machines, lambda one: key(one) if build or key(one) is None else key(one).partition("+")[0])
    if len(values) > 1:
        yield Finding(level, subject, f"versions differ: {_listed(values)}", remedy)


def _listed(values: Sequence[tuple[Any, tuple[int, ...]]]) -> str:
    return "; ".join(f"{value or 'none'} on {ranks_in_words(ranks)}" for value, ranks in values)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Ranks as "rank 3" or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def _runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a GPU runs kernels built for these: those of its own major version and at most its minor one, and PTX
    (``compute_``) of any older version, which the driver compiles. Suffixed ones (``sm_90a``) run on that one only."""
    for word in architectures:
        kind, _, number = word.partition("_")
        exact = not number.isdigit()
        number = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not number.isdigit():
            continue
        built = divmod(int(number), 10)
        if kind == "sm" and (built == capability if exact else built[0] == capability[0] and built <= capability):
            return True
        if kind == "compute" and not exact and built <= capability:
            return True
    return False


def _numbers(version: str) -> tuple[int, ...]:
    """2.11.0+cu126 as (2, 11, 0); what follows the first word that is no number is left out."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = "".join(letter for letter in part if letter.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
