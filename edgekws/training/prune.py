"""Which channels go, to what cost, and the surgery.

A score for each output channel of each convolution says what the loss would miss. Channels that must go together (a depthwise convolution
and the one before it, the ends of a residual) are one group, found by torch-pruning. Then a knapsack, greedy: of all groups, take eight
channels from where the least score is lost for the cost saved, until the cost is met. So layers end up as wide as each deserves, in
widths that backends like. The head's outputs are never pruned: the embedding keeps its length, and prototypes stay comparable.

    l1       sum of magnitudes, over the layer's mean              Li et al. 2017; data-free, as OnDA-2
    bn       magnitude of the folded batch norm: that of bias and weights' norm together; Liu et al. 2017 (network slimming)
    taylor   |sum of weight · gradient|                            Molchanov et al. 2019
    fisher   sum of weight² · E[gradient²]                         LeCun et al. 1990 (OBD) with the empirical Fisher
    hap      Hutchinson's trace of the Hessian, over the channel's size, · |weight|²; below zero counts as zero   Yu et al. 2022, as OnDA-1
    random   chance, the control
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekws.errors import UsageError
from edgekws.frontend import HOP_FRAMES, N_MELS
from edgekws.power import PowerMeter, Recording
from edgekws.power.per_hop import least_cpu_s
from edgekws.training.networks import Network, Residual

CRITERIA = ("hap", "taylor", "fisher", "l1", "bn", "random")
PROBES = 16  # a probe costs four to five training steps
ROUND_TO = 8
RIDGE = 1e-3
# Of a layer's channels that stay at least: scores are of one channel at a time, and say nothing of a layer that is nearly gone.
KEPT_SHARE = 1 / 8

Widths = dict[int, int]
"""Number of a convolution, in the order of the data → its output channels."""


def channel_scores(network: Network, criterion: str, losses: Callable[[int], Tensor], *, batches: int = 4, seed: int = 0) -> list[Tensor]:
    """What each output channel of each convolution is worth: one tensor (channels,) a convolution.

    Args:
        losses: the training loss on the batch of that number, with a graph.
        batches: that a data-aware criterion looks at; for `hap`, `PROBES` probes are spread over them.

    Raises:
        UsageError: no such criterion.
    """
    if criterion not in CRITERIA:
        raise UsageError(f'no criterion "{criterion}". Accepted: {", ".join(CRITERIA)}')
    weights = [conv.conv.weight for conv in network.convs()]
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(w), generator=generator) for w in weights]
    if criterion == "l1":
        sums = [w.detach().abs().flatten(1).sum(1) for w in weights]
        return [one / one.mean() for one in sums]
    if criterion == "bn":
        folded = [conv.folded() for conv in network.convs()]
        sizes = [(w.detach().flatten(1).norm(dim=1) ** 2 + b.detach() ** 2).sqrt() for w, b in folded]
        return [one / one.mean() for one in sizes]
    torch.manual_seed(seed)
    total = [torch.zeros(len(w)) for w in weights]
    for number in range(batches):
        loss = losses(number)
        gradients = torch.autograd.grad(loss, weights, create_graph=criterion == "hap")
        if criterion == "taylor":
            parts = [(w.detach() * g).flatten(1).sum(1) for w, g in zip(weights, gradients, strict=True)]
        elif criterion == "fisher":
            parts = [(w.detach() ** 2 * g**2).flatten(1).sum(1) for w, g in zip(weights, gradients, strict=True)]
        else:
            parts = _hutchinson(weights, gradients, max(1, PROBES // batches))
        total = [a + b.detach() for a, b in zip(total, parts, strict=True)]
    if criterion == "hap":
        # A negative curvature says nothing of what is lost without the channel, and would rank it below a dead one.
        return [t.clamp(min=0) * w.detach().flatten(1).pow(2).mean(1) / batches for t, w in zip(total, weights, strict=True)]
    return [t.abs() / batches for t in total]


def _hutchinson(weights: Sequence[Tensor], gradients: Sequence[Tensor], probes: int) -> list[Tensor]:
    """E[v · Hv] of each output channel, v of -1 and 1."""
    total = [torch.zeros(len(w)) for w in weights]
    for probe in range(probes):
        signs = [torch.randint(0, 2, w.shape).to(w.dtype) * 2 - 1 for w in weights]
        # The product itself, not its parts as grad_outputs: for those torch imports sympy, 0.6 s of CPU time.
        along = torch.stack([(g * v).sum() for g, v in zip(gradients, signs, strict=True)]).sum()
        products = torch.autograd.grad(along, weights, retain_graph=probe + 1 < probes)
        total = [t + (v * p).flatten(1).sum(1) for t, v, p in zip(total, signs, products, strict=True)]
    return [t / probes for t in total]


def groups(network: Network) -> list[list[int]]:
    """Convolutions whose output channels go together, by their numbers in `network.convs()`."""
    import torch_pruning

    network = copy.deepcopy(network)
    graph = _dependencies(network)
    convs = [conv.conv for conv in network.convs()]
    found: list[list[int]] = []
    for number, conv in enumerate(convs):
        if any(number in group for group in found):
            continue
        group = graph.get_pruning_group(conv, _prune_out(torch_pruning, conv), idxs=[0])
        members = {number}
        for dependency, _ in group:
            module = dependency.target.module
            if dependency.handler in (torch_pruning.prune_conv_out_channels, torch_pruning.prune_depthwise_conv_out_channels):
                members |= {i for i, other in enumerate(convs) if other is module}
        found.append(sorted(members))
    return found


def _dependencies(network: Network) -> Any:
    """torch-pruning's graph; it follows gradients, so every weight must have one."""
    import torch_pruning

    frames = torch.zeros(1, HOP_FRAMES, N_MELS)
    return torch_pruning.DependencyGraph().build_dependency(
        network.requires_grad_(True), frames, forward_fn=lambda net, x: net.steps(x), verbose=False
    )


def _prune_out(torch_pruning: Any, conv: torch.nn.Conv2d) -> Any:
    depthwise = conv.groups == conv.out_channels and conv.groups > 1
    return torch_pruning.prune_depthwise_conv_out_channels if depthwise else torch_pruning.prune_conv_out_channels


def parameter_cost(network: Network) -> Callable[[Widths], float]:
    """Weights and biases of the network, had its convolutions these widths."""
    convs, head = network.convs(), network.head
    inputs = _inputs(network)

    def cost(widths: Widths) -> float:
        total = 0
        for i, conv in enumerate(convs):
            c = conv.spec
            out = widths[i]
            each = 1 if c.groups > 1 else (c.c_in if inputs[i] is None else widths[inputs[i]])
            total += out * each * c.kernel_t * c.kernel_f + out
        return float(total + head.out_features * (widths[len(convs) - 1] + 1))

    return cost


def _inputs(network: Network) -> dict[int, Any]:
    """The convolution that each one hears; None where it hears the frames. The sum of a residual is as wide as its last one."""
    numbers = {id(conv): i for i, conv in enumerate(network.convs())}
    found: dict[int, Any] = {}
    last = None
    for layer in network.layers:
        inner = layer.inner if isinstance(layer, Residual) else [layer]
        for conv in inner:
            found[numbers[id(conv)]] = last
            last = numbers[id(conv)]
    return found


class OutOfReach(UsageError):
    """Not even the narrowest network is that cheap."""

    def __init__(self, cost: float, target: float) -> None:
        super().__init__(f"the narrowest network costs {cost:.6g}, more than the target of {target:.6g}. Give a larger target")
        self.cost = cost


def choose_widths(
    network: Network, scores: Sequence[Tensor], cost: Callable[[Widths], float], target: float, *, round_to: int = ROUND_TO
) -> Widths:
    """Widths whose cost is at most `target`, losing as little score as a greedy knapsack can.

    Raises:
        OutOfReach: not even the narrowest network is that cheap.
    """
    members = groups(network)
    full: Widths = {i: conv.spec.c_out for i, conv in enumerate(network.convs())}
    worth = [np.sort(_group_score(scores, group)) for group in members]
    widths, now = full, cost(full)

    def with_width(g: int, width: int) -> tuple[float, Widths, float]:
        """The score that goes, or comes back, for the cost; the widths; and what they cost."""
        tried = {**widths, **dict.fromkeys(members[g], width)}
        price = cost(tried)
        narrower, wider = sorted((widths[members[g][0]], width))
        after, before = (float(worth[g][len(worth[g]) - kept :].sum()) for kept in (narrower, wider))
        # The score of those channels, and more for each the fewer the layer has left.
        lost = float(worth[g].sum()) * np.log(max(before, 1e-30) / max(after, 1e-30))
        return lost / max(price - now if width == wider else now - price, 1e-12), tried, price

    while now > target:
        narrower = {g: (widths[group[0]] - 1) // round_to * round_to for g, group in enumerate(members)}
        options = [with_width(g, width) for g, width in narrower.items() if width >= max(round_to, KEPT_SHARE * len(worth[g]))]
        if not options:
            raise OutOfReach(now, target)
        _, widths, now = min(options, key=lambda option: option[0])
    while True:  # the last channels that went may have been more than had to: what has room is given back
        wider = {g: min(full[group[0]], (widths[group[0]] // round_to + 1) * round_to) for g, group in enumerate(members)}
        options = [with_width(g, width) for g, width in wider.items() if width > widths[members[g][0]]]
        options = [option for option in options if option[2] <= target]
        if not options:
            return widths
        _, widths, now = max(options, key=lambda option: option[0])


def _group_score(scores: Sequence[Tensor], group: Sequence[int]) -> np.ndarray:
    """Of each channel of a group: what all its convolutions lose with it."""
    return np.asarray(torch.stack([scores[i] for i in group]).sum(0).detach().numpy(), np.float64)


def prune(network: Network, scores: Sequence[Tensor], widths: Mapping[int, int], frames: Tensor | None = None) -> Network:
    """A copy with the lowest channels of each group cut out, so that each convolution has its width.

    Args:
        frames: what it will hear, (N, T, 40). Whoever heard a channel that goes then hears in its place what those that stay can say of
            it, by least squares (as in He et al. 2017, arXiv:1707.06168). From edge-tiny to 40 472 parameters that leaves the loss, before
            any training, 0.4 above the whole network's instead of 1.1 (four development lives). None = nothing is heard in its place.
    """
    import torch_pruning

    cut = copy.deepcopy(network)
    convs = [conv.conv for conv in cut.convs()]
    heard = [] if frames is None else _heard(cut, frames)
    for group in groups(network):
        keep = widths[group[0]]
        order = np.argsort(_group_score(scores, group), kind="stable")
        gone = sorted(order[: len(order) - keep].tolist())
        if gone:
            for module, said_by, inputs in heard:
                if said_by in group:
                    _say_instead(module, inputs, gone)
            conv = convs[group[0]]
            _dependencies(cut).get_pruning_group(conv, _prune_out(torch_pruning, conv), idxs=gone).prune()
    return _as_cut(cut)


def _heard(network: Network, frames: Tensor) -> list[tuple[Any, int, Tensor]]:
    """Each module that mixes channels, the number of the convolution that it hears, and what it hears: (channels, samples)."""
    sources = _inputs(network)
    said_by: dict[torch.nn.Module, int] = {
        conv.conv: sources[i] for i, conv in enumerate(network.convs()) if sources[i] is not None and conv.spec.groups == 1
    }
    said_by[network.head] = len(sources) - 1
    found: list[tuple[Any, int, Tensor]] = []

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().movedim(-1 if module is network.head else 1, 0)
        found.append((module, said_by[module], x.flatten(1).double()))

    hooks = [module.register_forward_pre_hook(keep) for module in said_by]
    with torch.no_grad():
        network.steps(frames)
    for hook in hooks:
        hook.remove()
    return found


def _say_instead(module: Any, inputs: Tensor, gone: Sequence[int]) -> None:
    """Give the weights of the channels that go to those that stay, and to the bias, so that the module hears nearly the same."""
    stay = [channel for channel in range(len(inputs)) if channel not in gone]
    known = torch.cat([inputs[stay], inputs.new_ones(1, inputs.shape[1])])
    square = known @ known.T
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    share = torch.linalg.solve(square, known @ inputs[gone].T).float()  # (stay + 1, gone)
    with torch.no_grad():
        weight = module.weight
        module.bias += weight[:, gone].reshape(len(weight), len(gone), -1).sum(2) @ share[-1]
        weight[:, stay] += torch.einsum("og...,sg->os...", weight[:, gone], share[:-1])


def _as_cut(cut: Network) -> Network:
    """The same weights in a network whose spec says the new widths."""

    def layer(conv: Any) -> list[Any]:
        c, module = conv.spec, conv.conv
        return [module.in_channels, module.out_channels, c.kernel_t, c.kernel_f, c.stride_t, c.stride_f, module.groups, c.relu]

    def part(one: Any) -> Any:
        return {"residual": [layer(inner) for inner in one.inner]} if isinstance(one, Residual) else layer(one)

    layers = [part(one) for one in cut.layers]
    network = Network({**cut.spec, "layers": layers}, norm=cut.convs()[0].norm is not None)
    network.load_state_dict(cut.state_dict())
    return network.eval()


def latency_cost(network: Network) -> Callable[[Widths], float]:
    """CPU seconds of a hop on this very host, from a table: what was measured with each group at some widths, the others as they are.

    The savings of groups do not quite add up, since one group feeds another. So they are scaled to what all groups save at their narrowest,
    which is measured too: of `edge` their sum left 25 µs of 43.
    """
    members = groups(network)
    flat = [torch.arange(float(conv.spec.c_out)) for conv in network.convs()]
    full: Widths = {i: conv.spec.c_out for i, conv in enumerate(network.convs())}
    tried: list[tuple[int, int]] = []
    for g, group in enumerate(members):
        width = full[group[0]]
        first = max(1, math.ceil(KEPT_SHARE * width / ROUND_TO)) * ROUND_TO
        tried += [(g, narrower) for narrower in range(first, width, max(ROUND_TO, width // 8 // ROUND_TO * ROUND_TO))]
    changes = [dict.fromkeys(members[g], narrower) for g, narrower in tried]
    narrowest = {i: narrower for change in reversed(changes) for i, narrower in change.items()}
    whole, least, *each = hop_cpu_s([network, *(prune(network, flat, {**full, **change}) for change in (narrowest, *changes))])
    table: list[dict[int, float]] = [{full[group[0]]: 0.0} for group in members]
    for (g, narrower), cost_s in zip(tried, each, strict=True):
        table[g][narrower] = whole - cost_s
    for one in table:  # whatever was measured, who is narrower saves no less
        widest_first = sorted(one, reverse=True)
        one.update(zip(widest_first, np.maximum.accumulate([one[width] for width in widest_first]).tolist(), strict=True))
    saved = sum(one[min(one)] for one in table)
    scale = max(0.0, whole - least) / saved if saved else 0.0

    def cost(widths: Widths) -> float:
        total = whole
        for group, one in zip(members, table, strict=True):
            known = sorted(one)
            total -= scale * float(np.interp(widths[group[0]], known, [one[w] for w in known]))
        return total

    return cost


def energy_cost(network: Network, meter: PowerMeter, window_s: float = 4.0) -> Callable[[Widths], float]:
    """Joules of a hop on this very host above idle: the table of `latency_cost`, times what a second of this network draws.

    One core computes whatever the widths, so the power is taken as one and the same; it is measured once, on the whole network, with an
    idle window before and one after.

    Raises:
        UsageError: there is no meter, or what is drawn cannot be told from idle.
    """
    run = _hops(network)
    cpu_s = 0.0
    with Recording(meter) as recording:
        edges = [time.monotonic()]
        for busy in (False, True, False):
            if busy:
                start_s = time.thread_time()
                while time.monotonic() < edges[-1] + window_s:
                    run(50)
                cpu_s = time.thread_time() - start_s
            else:
                time.sleep(window_s)
            recording.sample()  # at the edge itself: on a loaded machine the meter's thread may be late
            edges.append(time.monotonic())
    before, load, after = (recording.energy(*window) for window in pairwise(edges))
    for one in (before, load, after):
        if one.joules is None:
            raise UsageError(f"no target in energy_mj here: {one.why_not}. Give params=… or latency_ms=…")
    assert before.mean_mw is not None and load.mean_mw is not None and after.mean_mw is not None
    drawn_mw = load.mean_mw - (before.mean_mw + after.mean_mw) / 2
    noise_mw = max(abs(before.mean_mw - after.mean_mw), meter.step_mw or 0.0)
    if drawn_mw <= noise_mw:
        raise UsageError(
            f"no target in energy_mj here: a busy core draws {drawn_mw:.0f} mW more than idle by {meter.name}, and idle alone differs by"
            f" {noise_mw:.0f} mW. Stop what else runs, or give latency_ms=…"
        )
    joules_per_cpu_s = drawn_mw / 1000 * (edges[2] - edges[1]) / cpu_s
    seconds = latency_cost(network)
    return lambda widths: joules_per_cpu_s * seconds(widths)


def hop_cpu_s(networks: Sequence[Network]) -> list[float]:
    """CPU time of one hop of each in ONNX Runtime."""
    return least_cpu_s([_hops(network) for network in networks], 200, 5)


def _hops(network: Network) -> Callable[[int], None]:
    """Runs so many hops in ONNX Runtime on one thread."""
    import onnxruntime

    from edgekws.training.export import to_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(network)[0], options, providers=["CPUExecutionProvider"])
    feeds = {one.name: np.zeros(one.shape, np.float32) for one in session.get_inputs()}

    def run(count: int) -> None:
        for _ in range(count):
            session.run(["embedding"], feeds)

    return run
