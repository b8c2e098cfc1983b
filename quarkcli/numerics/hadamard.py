"""Makes Hadamard matrices of many sizes, and multiplies by them in log time. Exact integers: H H^T = n I.

A matrix of size n is the Kronecker product of one of size K, by Paley's two constructions over finite fields, and of
Sylvester's of size 2^k. Sources: Paley 1933 (I: q + 1 for prime powers q = 3 mod 4; II: 2 (q + 1) for q = 1 mod 4).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import isqrt

import torch
from torch import Tensor

LARGEST = 2048  # of the matrices by Paley that are tried: a dense factor beyond costs more than a smaller block
_PIECE = 1 << 24  # values that are turned at once; bounds the scratch memory


def base(n: int) -> int | None:
    """Returns the smallest K with n = K 2^k for which there is a matrix here; None: there is none of size n."""
    odd = n // (n & -n)
    if odd == 1:
        return 1
    size = odd * 4
    while n % size == 0 and size <= LARGEST:
        if _paley_field(size) is not None:
            return size
        size *= 2
    return None


def largest_block(n: int) -> int:
    """Returns the largest power of two that divides n."""
    return n & -n


@lru_cache(maxsize=64)
def factors(n: int) -> tuple[Tensor, ...]:
    """Returns Hadamard matrices, int8, whose Kronecker product is the one of size n; none is larger than K and 128.

    The largest of Sylvester's is the last one: it is a single product of matrices for all rows.
    Raises ValueError for a size that has none here.
    """
    size = base(n)
    if size is None:
        raise ValueError(f"no Hadamard matrix of size {n}")
    found: list[Tensor] = []
    rest = n // size
    while rest > 1:
        step = min(rest, 128)
        found.insert(0, sylvester(step))
        rest //= step
    if size > 1:
        found.insert(0, paley(size))
    return tuple(found) or (torch.ones(1, 1, dtype=torch.int8),)


def hadamard(n: int) -> Tensor:
    """Returns the matrix of size n, int8."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for factor in factors(n):
        matrix = torch.kron(matrix, factor)
    return matrix


def sylvester(n: int) -> Tensor:
    """Returns Sylvester's matrix of size n, a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def turned(x: Tensor, n: int) -> Tensor:
    """Returns x with every run of n values along the last axis multiplied by H / sqrt(n); floats stay as wide."""
    matrices = [factor.to(x) for factor in factors(n)]
    rows = x.reshape(-1, n)
    pieces = [_turned(piece, matrices) for piece in rows.split(max(1, _PIECE // n))]
    return torch.cat(pieces).div_(n**0.5).reshape(x.shape)


def _turned(rows: Tensor, matrices: list[Tensor]) -> Tensor:
    """Multiplies rows [count, n] by the Kronecker product of the matrices, one after the other."""
    count, n = rows.shape
    before = 1
    for matrix in matrices:
        size = len(matrix)
        rest = n // (before * size)
        # The last one as a single product: thousands of products with a vector are far slower.
        rows = rows.reshape(-1, size) @ matrix if rest == 1 else matrix.T @ rows.reshape(-1, size, rest)
        before *= size
    return rows.reshape(count, n)


# -- finite fields and Paley's constructions --------------------------------------------------------------------------


def paley(size: int) -> Tensor:
    """Returns the matrix of Paley's first construction where there is one, else of the second, int8."""
    q = _paley_field(size)
    assert q is not None, size
    core = _jacobsthal(q)
    if q + 1 == size:
        edged = torch.zeros(size, size, dtype=torch.int8)
        edged[0, 1:], edged[1:, 0], edged[1:, 1:] = 1, -1, core
        return edged + torch.eye(size, dtype=torch.int8)
    edged = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    edged[0, 1:], edged[1:, 0], edged[1:, 1:] = 1, 1, core
    ones = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    twisted = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(edged, ones) + torch.kron(torch.eye(q + 1, dtype=torch.int8), twisted)


def _paley_field(size: int) -> int | None:
    """Returns the order of the finite field that a matrix of this size is made from."""
    if size % 4:
        return None
    if (size - 1) % 4 == 3 and _prime_power(size - 1):
        return size - 1
    q = size // 2 - 1
    return q if q % 4 == 1 and _prime_power(q) else None


@lru_cache(maxsize=4096)
def _prime_power(q: int) -> tuple[int, int] | None:
    """Returns (prime, exponent) of a power of a prime, None for other numbers."""
    if q < 2:
        return None
    prime = next((p for p in range(2, isqrt(q) + 1) if q % p == 0), q)
    exponent = 0
    while q % prime == 0:
        q //= prime
        exponent += 1
    return (prime, exponent) if q == 1 else None


def _jacobsthal(q: int) -> Tensor:
    """Returns [q, q]: 1 where the difference of two elements of the field is a square, -1 where not, 0 for none."""
    found = _prime_power(q)
    assert found is not None
    p, exponent = found
    if exponent == 1:
        elements = torch.arange(q)
        squares = elements * elements % q
        difference = (elements[:, None] - elements) % q
    else:
        digits = torch.tensor(list(product(range(p), repeat=exponent)))  # coefficients, the highest power first
        weights = torch.tensor([p**i for i in reversed(range(exponent))])
        squares = _squares(digits, p, _irreducible(p, exponent)) @ weights
        difference = ((digits[:, None] - digits) % p) @ weights
    sign = torch.full((q,), -1, dtype=torch.int8)
    sign[squares] = 1
    sign[0] = 0
    return sign[difference]


def _squares(digits: Tensor, p: int, modulus: tuple[int, ...]) -> Tensor:
    """Returns the squares of polynomials (coefficients, the highest power first) by a monic `modulus` over GF(p)."""
    count, degree = digits.shape
    whole = torch.zeros(count, 2 * degree - 1, dtype=torch.int64)
    for i in range(degree):
        for j in range(degree):
            whole[:, i + j] += digits[:, i] * digits[:, j]
    low = torch.tensor(modulus[1:])
    for i in range(degree - 1):
        whole[:, i + 1 : i + 1 + degree] -= whole[:, i, None] * low
    return whole[:, degree - 1 :] % p


def _irreducible(p: int, degree: int) -> tuple[int, ...]:
    """Returns the first monic polynomial over GF(p) that none of half its degree or less divides."""
    return next(
        (1, *low)
        for low in product(range(p), repeat=degree)
        if not any(
            _divides((1, *other), (1, *low), p)
            for size in range(1, degree // 2 + 1)
            for other in product(range(p), repeat=size)
        )
    )


def _divides(divisor: tuple[int, ...], polynomial: tuple[int, ...], p: int) -> bool:
    rest = list(polynomial)
    while len(rest) >= len(divisor):
        lead = rest[0]
        rest = [(a - lead * b) % p for a, b in zip(rest, (*divisor, *[0] * len(rest)), strict=False)][1:]
    return not any(rest)
