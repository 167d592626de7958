r"""Tree-structured histograms (Chow & Liu 1968, IEEE Trans. Inf. Theory 14; forests: Tan, Anandkumar & Willsky 2011,
arXiv:1005.0766).

Every dimension i has fine cells f_i (see `bins`) and coarse groups g_i of neighbouring cells, about equal in mass,
whose pairs can be counted. With at most one parent pa(i) per dimension,
    P(f) = prod_i P(g_i | g_pa(i)) P(f_i | g_i).
The likelihood is greatest when the edges are a maximum spanning tree of the mutual informations I(g_i; g_j); an
estimate from N examples is too large by about (|g_i| - 1)(|g_j| - 1) / 2N on average (Miller 1955), which is taken
off, and edges with nothing left are left out. Given classes, I is the conditional I(g_i; g_j | class) (Friedman,
Geiger & Goldszmidt 1997, Machine Learning 29), and all classes share the tree.

Sparse counts are shrunk in three steps, each towards the one before, with pseudocount a and strengths alpha, kappa:
    P(f)         = (n(f) + a) / (N + a F),                                P(g) = sum over f in g of P(f)
    P(g | pa)    = (n(g, pa) + alpha P(g)) / (n(pa) + alpha)
    P(. | class) = (n_class(.) + kappa P(.)) / (n_class + kappa)
The number of groups and alpha, then kappa, maximize the leave-one-out likelihood: the same formulas with the
example taken out of every count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from torch import Tensor, nn

from trilemma.classical.bins import shrink, tally

GROUPS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
STRENGTHS = (0.5, 2.0, 8.0, 32.0, 128.0)
MAX_TABLE = 2**24
"""Entries of the largest table of pairs."""
SELECTION_NUMBERS = 2**18
"""The leave-one-out likelihood is averaged over as many examples as make this many numbers."""
STRUCTURE_COST = 2e11
"""Multiplications that the mutual informations may take; large D are estimated from fewer groups and examples."""


def group_cells(counts: Tensor, valid: Tensor, groups: int) -> Tensor:
    """Group (D, F) of each cell: neighbours together, about equal counts (D, F), numbered without gaps."""
    mass = counts.cumsum(1) - 0.5 * counts
    g = (groups * mass / counts.sum(1, keepdim=True)).long().clamp(0, groups - 1)
    step = torch.zeros_like(g)
    step[:, 1:] = ((g[:, 1:] > g[:, :-1]) & valid[:, 1:] & (valid[:, :-1].cumsum(1) > 0)).long()
    return step.cumsum(1)


def mutual_information(g: Tensor, groups: int, block: int = 64) -> Tensor:
    """Pairwise mutual informations (D, D) in nats of g (N, D) in 0..groups-1, less Miller's bias; diagonal zero."""
    n, d = g.shape
    onehot = nn.functional.one_hot(g, groups).float().reshape(n, d * groups)
    single = onehot.sum(0).double()
    entropy = -torch.xlogy(single / n, single / n).reshape(d, groups).sum(1)
    occupied = (single.reshape(d, groups) > 0).sum(1).double()
    joint = torch.empty(d, d, dtype=torch.float64, device=g.device)
    for start in range(0, d, block):
        stop = min(start + block, d)
        p = (onehot[:, start * groups : stop * groups].T @ onehot) / n
        joint[start:stop] = -torch.xlogy(p, p).reshape(stop - start, groups, d, groups).sum((1, 3)).double()
    bias = (occupied[:, None] - 1) * (occupied - 1) / (2 * n)
    return (entropy[:, None] + entropy - joint - bias).fill_diagonal_(0.0)


def maximum_spanning_forest(weights: np.ndarray) -> Tensor:
    """Parents (D,) in the maximum spanning forest of the positive weights (D, D); a root has parent D."""
    d = len(weights)
    forest = minimum_spanning_tree(csr_matrix(np.where(weights > 0, -weights, 0.0)))
    parents = np.full(d, d)
    _, component = connected_components(forest, directed=False)
    for root in np.unique(component, return_index=True)[1]:
        order, predecessor = breadth_first_order(forest, root, directed=False)
        parents[order[1:]] = predecessor[order[1:]]
    return torch.from_numpy(parents.astype(np.int64))


def chow_liu(f: Tensor, valid: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Parents (D,) of the Chow-Liu forest of cells f (N, D), given classes; a root has parent D."""
    n, d = f.shape
    counts = tally(f, valid.shape[1], torch.zeros_like(labels), 1)[0]
    groups = next((k for k in (8, 6, 4, 3, 2) if 1000 * (d * k) ** 2 <= STRUCTURE_COST), 2)
    n = min(n, max(500, int(STRUCTURE_COST / (d * groups) ** 2)))
    g = group_cells(counts, valid, groups).expand(n, -1, -1).gather(2, f[:n, :, None])[..., 0]
    total = torch.zeros(d, d, dtype=torch.float64, device=f.device)
    for c in range(classes):
        own = g[labels[:n] == c]
        if len(own) > 0:
            total += len(own) / n * mutual_information(own, groups)
    return maximum_spanning_forest(total.cpu().numpy()).to(f.device)


@dataclass(frozen=True)
class Counts:
    """Counts of cells f (N, D) and of groups with their parents' groups, for all data and for each class."""

    f: Tensor
    g: Tensor
    up: Tensor
    labels: Tensor
    group: Tensor
    valid: Tensor
    cell: Tensor  # (C, D, F)
    pair: Tensor  # (C, D, G, G): parent's group, own group

    @classmethod
    def of(
        cls, f: Tensor, labels: Tensor, classes: int, valid: Tensor, group: Tensor, groups: int, parent: Tensor
    ) -> Counts:
        g = _take(group, f)
        up = _parent_groups(g, parent)
        cell = tally(f, valid.shape[1], labels, classes)
        pair = tally(up * groups + g, groups**2, labels, classes).reshape(classes, -1, groups, groups)
        return cls(f, g, up, labels, group, valid, cell, pair)


class Forest(nn.Module):
    """The tables of a tree-structured histogram."""

    parent: Tensor
    group: Tensor
    p_pair: Tensor
    p_cell: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("parent", torch.empty(0, dtype=torch.int64))  # (D,), D for a root
        self.register_buffer("group", torch.empty(0, dtype=torch.int64))  # (D, F)
        self.register_buffer("p_pair", torch.empty(0, dtype=torch.float64))  # (C, D, G, G) P(g | parent's g)
        self.register_buffer("p_cell", torch.empty(0, dtype=torch.float64))  # (C, D, F) P(f | g)

    def fit(self, f: Tensor, labels: Tensor, classes: int, valid: Tensor, parent: Tensor, pseudocount: float) -> None:
        """Learn the tables of a given forest from cells f (N, D); choose groups and strengths."""
        d = f.shape[1]
        counts = tally(f, valid.shape[1], torch.zeros_like(labels), 1)[0]
        has_edges = bool((parent < d).any())
        sizes = [k for k in GROUPS if classes * d * k**2 <= MAX_TABLE or k == GROUPS[0]] if has_edges else [1]
        alphas = STRENGTHS if has_edges else STRENGTHS[:1]
        best, choice = -float("inf"), (sizes[0], alphas[0])
        middle = STRENGTHS[len(STRENGTHS) // 2]
        for groups in sizes:
            c = Counts.of(f, labels, classes, valid, group_cells(counts, valid, groups), groups, parent)
            for alpha in alphas:
                score = leave_one_out(c, parent, pseudocount, alpha, middle).mean().item()
                if score > best:
                    best, choice = score, (groups, alpha)
        groups, alpha = choice
        c = Counts.of(f, labels, classes, valid, group_cells(counts, valid, groups), groups, parent)
        kappa = middle
        if classes > 1:
            kappa = max(STRENGTHS, key=lambda k: leave_one_out(c, parent, pseudocount, alpha, k).mean().item())
        self.parent, self.group = parent, c.group
        self._set_tables(c, pseudocount, alpha, kappa)

    def _set_tables(self, c: Counts, a: float, alpha: float, kappa: float) -> None:
        cell, pair = c.cell.sum(0), c.pair.sum(0)
        classes, d, _ = c.cell.shape
        groups = pair.shape[-1]
        n_cells = c.valid.sum(1, keepdim=True).double()
        p_cell = shrink(cell, cell.sum(1, keepdim=True), c.valid / n_cells, a * n_cells)  # (D, F)
        p_pair = shrink(pair, pair.sum(2, keepdim=True), _sum_groups(p_cell, c.group, groups)[:, None], alpha)
        if classes > 1:
            p_cell = shrink(c.cell, c.cell.sum(2, keepdim=True), p_cell, kappa)
            p_pair = shrink(c.pair, c.pair.sum(3, keepdim=True), p_pair, kappa)
        p_cell, p_pair = p_cell.expand(classes, -1, -1), p_pair.expand(classes, -1, -1, -1)
        p_group = _sum_groups(p_cell, c.group, groups)
        root = (self.parent == d)[:, None, None]
        self.p_pair = torch.where(root, p_group[:, :, None], p_pair)
        self.p_cell = p_cell / p_group.gather(2, c.group.expand(classes, -1, -1))

    def log_prob(self, f: Tensor, labels: Tensor) -> Tensor:
        """log P(f | class) of cells f (N, D), (N,)."""
        g = _take(self.group, f)
        d, c = torch.arange(f.shape[1], device=f.device), labels[:, None]
        up = _parent_groups(g, self.parent)
        return (self.p_pair[c, d, up, g].log() + self.p_cell[c, d, f].log()).sum(1)

    def draw(self, labels: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Cells f (N, D) by inversion of uniform u (groups) and v (cells in their group), both (N, D)."""
        n, d = u.shape
        g = torch.zeros(n, d + 1, dtype=torch.int64, device=u.device)  # the last column: the parent of the roots
        for level in self._levels():
            conditional = self.p_pair[labels[:, None], level, g[:, self.parent[level]]]  # (n, level, G)
            g[:, level] = _invert(conditional, u[:, level])
        g = g[:, :d]
        f = torch.empty_like(g)
        for start in range(0, d, 64):  # in pieces: (n, D, F) may be large
            part = slice(start, start + 64)
            inside = self.group[part] == g[:, part, None]
            f[:, part] = _invert(torch.where(inside, self.p_cell[labels, part], 0.0), v[:, part])
        return f

    def _levels(self) -> list[Tensor]:
        """Dimensions by their depth in the forest."""
        d = len(self.parent)
        levels, above = [], torch.tensor([d], device=self.parent.device)
        while len(above):
            above = torch.isin(self.parent, above).nonzero()[:, 0]
            levels.append(above)
        return levels[:-1]


def leave_one_out(c: Counts, parent: Tensor, a: float, alpha: float, kappa: float) -> Tensor:
    """log P(f_i | class_i) without example i in any count, (m,) for the first m examples."""
    classes, d, _ = c.cell.shape
    m = min(len(c.f), max(1, SELECTION_NUMBERS // d))
    f, g, up, label, dims = c.f[:m], c.g[:m], c.up[:m], c.labels[:m, None], torch.arange(d, device=c.f.device)
    cell, pair = c.cell.sum(0), c.pair.sum(0)
    n, n_cells = len(c.f), c.valid.sum(1).double()
    groups = pair.shape[-1]
    cells_in = _sum_groups(c.valid.double(), c.group, groups)[dims, g]

    def own(cell: Tensor, pair: Tensor) -> tuple[Tensor, ...]:
        """Counts of the example's cell, group, (parent, group) and parent, without the example."""
        in_group = _sum_groups(cell, c.group.expand_as(cell), groups)
        where = (label, dims) if cell.ndim == 3 else (dims,)
        return cell[*where, f] - 1, in_group[*where, g] - 1, pair[*where, up, g] - 1, pair.sum(-1)[*where, up] - 1

    n_f, n_g, n_pair, n_up = own(cell, pair)
    p_f = shrink(n_f, n - 1, 1 / n_cells, a * n_cells)
    p_g = shrink(n_g, n - 1, cells_in / n_cells, a * n_cells)
    p_pair = shrink(n_pair, n_up, p_g, alpha)
    if classes > 1:
        n_f, n_g, n_pair, n_up = own(c.cell, c.pair)
        n_class = torch.bincount(c.labels, minlength=classes)[label] - 1
        p_f, p_g = shrink(n_f, n_class, p_f, kappa), shrink(n_g, n_class, p_g, kappa)
        p_pair = shrink(n_pair, n_up, p_pair, kappa)
    return (torch.where(parent == d, p_g, p_pair).log() + (p_f / p_g).log()).sum(1)


def _take(table: Tensor, f: Tensor) -> Tensor:
    """table[d, f[n, d]], (N, D)."""
    return table[torch.arange(f.shape[1], device=f.device), f]


def _parent_groups(g: Tensor, parent: Tensor) -> Tensor:
    """The group of each dimension's parent, (N, D); 0 for a root."""
    return torch.cat([g, torch.zeros_like(g[:, :1])], 1)[:, parent]


def _sum_groups(cells: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums (*, D, G) of cells (*, D, F) over each group."""
    total = cells.new_zeros(*cells.shape[:-1], groups)
    return total.scatter_add_(-1, group.expand_as(cells), cells)


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """The index drawn by uniform u (*) from the distribution p (*, K)."""
    cumulative = p.cumsum(-1)
    threshold = (u * cumulative[..., -1]).unsqueeze(-1)
    # An index of probability zero is never drawn: u < 1 keeps the threshold below the last increase.
    return (cumulative <= threshold).sum(-1).clamp(max=p.shape[-1] - 1)
