"""The cluster file: pools of GPUs, their nodes, memory and links."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_hetermoe.config.errors import Problems, UsageError
from megatron_hetermoe.config.shape import ModelShape
from megatron_hetermoe.cost.curves import Curve, Notes
from megatron_hetermoe.cost.devices import device_table
from megatron_hetermoe.cost.estimate import Estimate
from megatron_hetermoe.cost.profile import Profile, Profiled, read_profile
from megatron_hetermoe.cost.slurm import slurm_options
from megatron_hetermoe.topology.layout import MOST_RANKS

Kind = Estimate | Profiled

MOST_TENSORS = 2  # of a transfer with each peer: rows, and what comes with copies
_MOST = 1e12  # in whatever unit; a float holds it, and so does all that is reckoned with it

EXAMPLE = "pools: {new: {kind: A40, nodes: 3, gpus_per_node: 2, memory_gb: 48, " \
          "intra_node: {gb_per_s: 20, latency_us: 10}, inter_node: {gb_per_s: 12.5, latency_us: 20}}, old: {...}}"


@dataclass(frozen=True)
class Link:
    """A rank's connection, the same in both directions, which do not disturb each other.

    Attributes:
        bandwidth: bytes a second.
        latency: seconds until the first byte is there.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class ClusterPool:
    """GPUs of one kind.

    Attributes:
        name: in the cluster file.
        kind: row of the device table, or path of a profile.
        nodes, gpus_per_node: how many.
        memory: of one GPU, bytes.
        intra: link of a GPU to others of its node.
        inter: link of a node to other nodes, which its GPUs share.
        slurm: options of sbatch that get nodes of this pool, without their dashes.
        channel: of the cluster, measured: seconds of a transfer by the bytes of its busiest rank. It replaces what
            links say of transfers between roles.
        channel_host: of the cluster, measured: seconds in which a host queues a transfer of one and of two tensors with each
            peer; empty where that was not measured.
    """

    name: str
    kind: str
    nodes: int
    gpus_per_node: int
    memory: float
    intra: Link
    inter: Link
    slurm: Mapping[str, str] = field(default_factory=dict, hash=False)
    channel: Curve | None = None
    channel_host: tuple[float, ...] = ()

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def rank_inter(self) -> Link:
        """A rank's part of its node's link. In a schedule the ranks of a pool transfer at the same time, so an equal
        part is what each gets."""
        return Link(self.inter.bandwidth / self.gpus_per_node, self.inter.latency)


@dataclass(frozen=True)
class Cluster:
    """All pools.

    Attributes:
        pools: by name, in the file's order.
        origin: name of the file.
        slurm: options of sbatch for every job, without their dashes.
    """

    pools: dict[str, ClusterPool]
    origin: str = "the cluster"
    slurm: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools.values())

    def without_node(self, name: str) -> Cluster:
        """The cluster when a node of a pool is gone."""
        pools = {key: replace(pool, nodes=pool.nodes - (key == name)) for key, pool in self.pools.items()}
        return Cluster({key: pool for key, pool in pools.items() if pool.nodes}, f"{self.origin} less a node of {name}")

    def only(self, name: str) -> Cluster:
        """One pool alone."""
        return Cluster({name: self.pools[name]}, f"{name} of {self.origin}")


def read_cluster(path: str | Path, notes: Notes | None = None) -> Cluster:
    """Reads a cluster file.

    Args:
        path: the file.
        notes: gets what is read beyond the measurements of a channel.

    Raises:
        UsageError: as ``cluster_from_document``, or when the file is no YAML.
    """
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError([f"cannot read the cluster file {path}: {error.strerror}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets through what int() and dates raise
        raise UsageError([f"the cluster file {path} is not YAML: {' '.join(str(error).split())}"]) from None
    return cluster_from_document(document, str(path), notes)


def cluster_from_document(document: Any, origin: str, notes: Notes | None = None) -> Cluster:
    """A cluster as a user writes it, see EXAMPLE. ``memory_gb`` may be left out for a row of the device table that is
    sold with one size only.

    Raises:
        UsageError: with every pool and figure that does not fit.
    """
    problems = Problems()
    pools = document.get("pools") if isinstance(document, dict) else None
    if not isinstance(pools, dict) or not pools:
        raise UsageError([f"{origin} names no pools; write it as {EXAMPLE}"])
    for key in sorted(document.keys() - {"pools", "channel", "channel_host", "slurm"}, key=str):
        problems.add(f"{origin}: unknown key {key!r}; a cluster has 'pools' and, where it was measured, 'channel' and "
                     "'channel_host', and 'slurm' where there is one")
    channel = _channel(document.get("channel"), origin, notes or Notes(), problems)
    channel_host = _channel_host(document.get("channel_host"), origin, problems)
    slurm = slurm_options(document.get("slurm"), origin, problems)
    result = {}
    for name, entry in pools.items():
        pool = _pool(str(name), entry, f"{origin}, pool {name}", Path(origin).parent, problems)
        if pool:
            result[pool.name] = replace(pool, channel=channel, channel_host=channel_host)
    problems.raise_if_any()
    return Cluster(result, origin, slurm)


def _channel(points: Any, origin: str, notes: Notes, problems: Problems) -> Curve | None:
    """What ``hetermoe profile --network`` measured, as {bytes: seconds}."""
    if points is None:
        return None
    figures = [*points.keys(), *points.values()] if isinstance(points, dict) else []
    if not figures or not all(isinstance(one, (int, float)) and 0 < one < float("inf") for one in figures):
        problems.add(f"{origin}: channel must map bytes to seconds, all positive; `hetermoe profile --network` "
                     f"measures it")
        return None
    return Curve("channel", "bytes", points, notes)


def _channel_host(seconds: Any, origin: str, problems: Problems) -> tuple[float, ...]:
    """What ``hetermoe profile --network`` measured of the host."""
    if seconds is None:
        return ()
    if not isinstance(seconds, list) or len(seconds) != MOST_TENSORS or not all(
            isinstance(one, (int, float)) and not isinstance(one, bool) and 0 <= one < float("inf") for one in seconds):
        problems.add(f"{origin}: channel_host must list the seconds in which a host queues a transfer of one and of "
                     f"two tensors, from 0 on; `hetermoe profile --network` measures them")
        return ()
    return tuple(map(float, seconds))


_KEYS = ("kind", "nodes", "gpus_per_node", "memory_gb", "intra_node", "inter_node", "slurm")


def _pool(name: str, entry: Any, where: str, folder: Path, problems: Problems) -> ClusterPool | None:
    if not isinstance(entry, dict):
        problems.add(f"{where} is not a mapping with {', '.join(_KEYS)}")
        return None
    found = Problems()
    for key in sorted(entry.keys() - set(_KEYS), key=str):
        found.add(f"{where}: unknown key {key!r}{_near(key, _KEYS)}; known are {', '.join(_KEYS)}")
    kind = _kind(entry.get("kind"), where, folder, found)
    counts = [_figure(entry, key, where, found, whole=True) for key in ("nodes", "gpus_per_node")]
    sizes = device_table()[kind].memory if kind in device_table() else ()
    if "memory_gb" in entry or len(sizes) != 1:
        memory = _figure(entry, "memory_gb", where, found) * 1e9
    else:
        memory = sizes[0]
    links = []
    for key in ("intra_node", "inter_node"):
        if isinstance(entry.get(key), dict):
            bandwidth = _figure(entry[key], "gb_per_s", f"{where}, {key}", found)
            latency = _figure(entry[key], "latency_us", f"{where}, {key}", found, zero=True)
            links.append(Link(bandwidth * 1e9, latency * 1e-6))
        else:
            found.add(f"{where}: {key} is missing; write it as {{gb_per_s: 12.5, latency_us: 20}}")
    slurm = slurm_options(entry.get("slurm"), where, found)
    try:
        found.raise_if_any()
    except UsageError as error:
        problems.extend(error)
        return None
    return ClusterPool(name, kind, int(counts[0]), int(counts[1]), memory, *links, slurm)


def _kind(kind: Any, where: str, folder: Path, problems: Problems) -> str:
    """A row's name, or the path of a profile that is there."""
    if not isinstance(kind, str):
        problems.add(f"{where}: kind is missing; name a row of the device table or a profile file")
        return ""
    if kind in device_table():
        return kind
    for path in (folder / kind, Path(kind)):
        if path.is_file():
            return str(path)
    problems.add(f"{where}: kind {kind!r} has no row in the device table and is no profile file"
                 f"{_near(kind, device_table())}: give the path of a profile, or take a row: "
                 f"{', '.join(device_table())}")
    return ""


def _figure(entry: dict, key: str, where: str, problems: Problems, whole: bool = False, zero: bool = False) -> float:
    value = entry.get(key)
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    most = MOST_RANKS if whole else _MOST
    if not is_number or not (0 if zero else 1e-12) <= value <= most:
        least = "a whole number from 1" if whole else "a number from 0" if zero else "a positive number"
        wanted = f"{least} up to {most:,.0f}"
        problems.add(f"{where}: {key} is {'missing' if value is None else repr(value)}; it must be {wanted}")
        return 0.0
    return float(value)


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def kinds_of(
    cluster: Cluster, shape: ModelShape, precision: str, notes: Notes, profiles: dict[str, Profile] | None = None
) -> dict[str, Kind]:
    """For each pool, what its GPUs cost.

    Args:
        cluster: the pools.
        shape: the model's.
        precision: of the parameters.
        notes: gets what is estimated or read beyond measurements.
        profiles: by pool, in place of the files that the cluster names.

    Raises:
        UsageError: with every profile that cannot be read or was taken for other shapes.
    """
    problems = Problems()
    kinds: dict[str, Kind] = {}
    for name, pool in cluster.pools.items():
        try:
            if profiles and name in profiles:
                kinds[name] = Profiled(profiles[name], shape, precision, notes)
            elif pool.kind in device_table():
                device = device_table()[pool.kind]
                if precision == "bf16" and not device.bf16:
                    notes.add(f"{pool.kind} has no bfloat16: it takes experts only, and a plan with them there has all "
                              f"experts in fp16, at the same speed as estimated here")
                kinds[name] = Estimate(device, shape, notes)
            else:
                kinds[name] = Profiled(read_profile(pool.kind), shape, precision, notes)
        except UsageError as error:
            problems.extend(error)
    problems.raise_if_any()
    _note_hosts(cluster, kinds, notes)
    return kinds


def _note_hosts(cluster: Cluster, kinds: Mapping[str, Kind], notes: Notes) -> None:
    """Says whose hosts are not counted."""
    free = list(dict.fromkeys(kind.name for kind in kinds.values() if not kind.host_is_known))
    if any(kind.has_host for kind in kinds.values()) and not all(
            pool.channel_host for pool in cluster.pools.values()):
        free.append("transfers")
    if free:
        notes.add(f"what the host takes to queue tasks was not measured and counts as nothing ({', '.join(free)}): where "
                  f"sequences are short it may be what a step takes")
