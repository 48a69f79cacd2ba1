"""Which configuration of a method fits into a budget of work."""

import attention
from attention.method import Method
from experiments.operands import Operands


def within(cls: type[Method], operands: Operands, budget: float) -> tuple[Method, float] | None:
    """The costliest configuration within the budget, of the default and its ladder; the cheapest if there is none.

    With its operations as a share of those of exact attention. None for exact methods, and for those that cannot take
    these operands.
    """
    can = cls.capabilities
    if can.exact or (operands.causal and not can.causal):
        return None
    shares = {method: work(method, operands) for method in (cls(), *cls().ladder(operands.key.shape[1]))}
    affordable = {method: share for method, share in shares.items() if share <= budget}
    if affordable:
        return max(affordable.items(), key=lambda pair: pair[1])
    return min(shares.items(), key=lambda pair: pair[1])


def work(method: Method, operands: Operands) -> float:
    """The operations of a method as a share of those of exact attention."""
    _, T, N, H = operands.query.shape
    S, sizes = operands.key.shape[1], {"num_heads": N, "head_dim": H, "is_causal": operands.causal}
    return method.cost(T, S, **sizes).flops / attention.Exact().cost(T, S, **sizes).flops
