"""Hyper-connections of DeepSeek-V4: four residual streams, mixed before and after each sublayer.

None of these functions is differentiable. On CPU tensors the reference computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jitgemm.device import H200
from jitgemm.errors import ProblemError
from jitgemm.families.hyper_connections import (
    COLUMNS,
    HC_MIX,
    HC_POST,
    HC_PRENORM,
    HC_SINKHORN,
    MAX_N,
    MIX_WIDTH,
    SPLIT_BLOCK,
    STREAMS,
    VECTOR,
    choose_mix_tokens,
    choose_num_splits,
    choose_prenorm,
)
from jitgemm.families.plain import PlainLaunch
from jitgemm.families.small_problem import PRECISIONS, SmallProblem
from jitgemm.ops.checks import check_apart, span_of
from jitgemm.ops.dispatch import needs_dispatch
from jitgemm.ops.plain import (
    MAX_GRID_Y,
    Call,
    Gpu,
    check_aligned,
    check_choice,
    check_contiguous,
    check_number,
    check_rows,
    check_tensor,
    define,
    on_gpu,
    plan_of,
    record_if_asked,
    row_stride,
)
from jitgemm.plan import device_facts, raw_stream
from jitgemm.reference import hyper_connections as reference

_MAX_ITERATIONS = 1000
_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # of streams


def hc_split_sinkhorn(
    mixes: Tensor,
    scale: Tensor,
    base: Tensor,
    sinkhorn_iterations: int = 20,
    eps: float = 1e-6,
    post_mult: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the four streams, from a token's 24 mixes ``m``.

    ``pre = sigmoid(m[:4] * scale[0] + base[:4]) + eps``, ``post = post_mult * sigmoid(m[4:8] * scale[1] + base[4:8])``,
    and ``comb``: softmax over the rows of ``m[8:] * scale[2] + base[8:]`` as 4 x 4, plus eps, then its columns and rows
    in turn divided by their sums plus eps, columns first and last.

    Args:
        mixes: fp32 [..., 24], contiguous.
        scale: fp32 [3].
        base: fp32 [24].
        sinkhorn_iterations: how often columns are normalized, at least once.
        eps: see above.
        post_mult: see above.

    Returns:
        fp32 pre [..., 4], post [..., 4] and comb [..., 4, 4], whose rows are the streams that are mixed and whose
        columns the results.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    arguments = (mixes, scale, base, sinkhorn_iterations, eps, post_mult)
    if needs_dispatch(mixes, scale, base):
        _check_sinkhorn(*arguments)
        pre, post, comb = torch.ops.jitgemm.hc_split_sinkhorn(*arguments)
        return pre, post, comb
    return _split_sinkhorn(*arguments)


def get_hc_prenorm_num_splits(m: int, k: int, num_sms: int | None = None) -> int:
    """How many parts of K fill a GPU best in ``tf32_hc_prenorm_gemm``.

    Args:
        m: rows of a.
        k: its columns.
        num_sms: multiprocessors; by default those of torch's current device, or of an H200 where there is none.

    Raises:
        ProblemError: a number is not accepted.
    """
    check_number("m", m, 0, 2**31 - 1)
    check_number("k", k, 1, 2**31 - 1)
    if num_sms is None:
        num_sms = device_facts(torch.cuda.current_device())[1] if torch.cuda.is_available() else H200.num_sms
    check_number("num_sms", num_sms, 1, 2**31 - 1)
    return choose_num_splits(m, k, num_sms)


def tf32_hc_prenorm_gemm(
    a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None = None, *, precision: str = "tf32"
) -> None:
    """``d = a @ b.T`` and ``sqr_sum``, the sums of the squares of a's rows, in one pass over a.

    Args:
        a: bf16 or fp32 [m, k], k contiguous and a multiple of 8, rows a multiple of 16 bytes apart.
        b: fp32 [n, k] of up to 24 rows, k contiguous, row stride a multiple of 4.
        d: output, fp32 [m, n], or [num_splits, m, n] of sums over parts of K, which the caller adds; contiguous.
        sqr_sum: output, fp32 [m] or [num_splits, m]; contiguous.
        num_splits: parts of K; None: one, without the dimension. Each has whole blocks of 64, the first ones one more.
            ``get_hc_prenorm_num_splits`` says how many are fast.
        precision: ``"tf32"``: b is rounded to TF32 (nearest), and so is an fp32 a, while bf16 is exact in it;
            ``"fp32"``: what is not exact is the sum of two TF32 numbers, which hold all but its last bits.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    arguments = (a, b, d, sqr_sum, num_splits, precision)
    if needs_dispatch(a, b, d, sqr_sum):
        _check_prenorm(*arguments)
        torch.ops.jitgemm.tf32_hc_prenorm_gemm(*arguments)
        return
    _prenorm(*arguments)


def hc_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float = 1e-6,
    eps: float = 1e-6,
    sinkhorn_iterations: int = 20,
    post_mult: float = 2.0,
    *,
    precision: str = "tf32",
) -> tuple[Tensor, Tensor, Tensor]:
    """A sublayer's input from the four streams, and the weights for ``hc_post``.

    The mixes are ``(X @ fn.T) / sqrt(mean(X^2) + norm_eps)`` with X a token's streams one after another; from them
    pre, post and comb as in ``hc_split_sinkhorn``; the input is ``sum over h of pre[h] * x[h]``.

    Args:
        x: bf16 or fp32 [tokens, 4, width], contiguous, width a multiple of 8.
        fn: fp32 [24, 4 * width], contiguous along K.
        scale: fp32 [3].
        base: fp32 [24].
        norm_eps: see above.
        eps: as in ``hc_split_sinkhorn``.
        sinkhorn_iterations: as there.
        post_mult: as there.
        precision: of the product, as in ``tf32_hc_prenorm_gemm``.

    Returns:
        bf16 [tokens, width], fp32 post [tokens, 4] and comb [tokens, 4, 4].

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: a kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    arguments = (x, fn, scale, base, norm_eps, eps, sinkhorn_iterations, post_mult, precision)
    if needs_dispatch(x, fn, scale, base):
        _check_pre(*arguments)
        y, post, comb = torch.ops.jitgemm.hc_pre(*arguments)
        return y, post, comb
    return _pre(*arguments)


def hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor, *, inplace: bool = False) -> Tensor:
    """The streams after a sublayer: ``y[k] = post[k] * x + sum over j of comb[j][k] * residual[j]``.

    Args:
        x: bf16 [tokens, width], the sublayer's output; contiguous, width a multiple of 8.
        residual: bf16 or fp32 [tokens, 4, width], contiguous.
        post: fp32 [tokens, 4], contiguous, from ``hc_pre``.
        comb: fp32 [tokens, 4, 4], likewise.
        inplace: write to ``residual``, and return it.

    Returns:
        [tokens, 4, width] in the type of ``residual``.

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: the kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    if not isinstance(inplace, bool):
        raise ProblemError(f"inplace is {inplace!r}; accepted is a boolean")
    if inplace and isinstance(residual, Tensor) and residual.requires_grad and torch.is_grad_enabled():
        raise ProblemError("residual requires a gradient; accepted in place are tensors that need none")
    if needs_dispatch(x, residual, post, comb):
        _check_post(x, residual, post, comb)
        if inplace:
            torch.ops.jitgemm.hc_post_(x, residual, post, comb)
            return residual
        result: Tensor = torch.ops.jitgemm.hc_post(x, residual, post, comb)
        return result
    if inplace:
        _post_into(x, residual, post, comb, residual)
        return residual
    return _post(x, residual, post, comb)


def hc_head(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float = 1e-6,
    eps: float = 1e-6,
    *,
    precision: str = "tf32",
) -> Tensor:
    """The four streams as one, after the last layer: ``sum over h of pre[h] * x[h]``.

    ``pre = sigmoid(mixes * scale + base) + eps``, with mixes as in ``hc_pre``.

    Args:
        x: bf16 or fp32 [tokens, 4, width], contiguous, width a multiple of 8.
        fn: fp32 [4, 4 * width], contiguous along K.
        scale: fp32 [1].
        base: fp32 [4].
        norm_eps: as in ``hc_pre``.
        eps: see above.
        precision: as in ``hc_pre``.

    Returns:
        bf16 [tokens, width].

    Raises:
        ProblemError: an argument is not of these; nothing has been launched.
        CacheMissError: a kernel is not cached, and compiling is forbidden or a CUDA graph is being captured.
    """
    arguments = (x, fn, scale, base, norm_eps, eps, precision)
    if needs_dispatch(x, fn, scale, base):
        _check_head(*arguments)
        result: Tensor = torch.ops.jitgemm.hc_head(*arguments)
        return result
    return _head(*arguments)


# -- hc_split_sinkhorn


def _check_sinkhorn(mixes: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, post_mult: float) -> None:
    if isinstance(mixes, Tensor) and mixes.dim() < 1:
        raise ProblemError(f"mixes has shape []; accepted is [..., {MIX_WIDTH}]")
    leading = list(mixes.shape[:-1]) if isinstance(mixes, Tensor) else []
    check_tensor("mixes", mixes, torch.float32, (*leading, MIX_WIDTH))
    check_tensor("scale", scale, torch.float32, (3,), mixes)
    check_tensor("base", base, torch.float32, (MIX_WIDTH,), mixes)
    check_contiguous(mixes=mixes, scale=scale, base=base)
    _check_numbers(iterations, eps, post_mult)


def _check_numbers(iterations: int, eps: float, post_mult: float) -> None:
    check_number("sinkhorn_iterations", iterations, 1, _MAX_ITERATIONS)
    check_number("eps", eps, 0, 1, float)
    check_number("post_mult", post_mult, -1e6, 1e6, float)


def _empty_weights(mixes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leading = mixes.shape[:-1]
    pre, post = (mixes.new_empty((*leading, STREAMS)) for _ in range(2))
    return pre, post, mixes.new_empty((*leading, STREAMS, STREAMS))


def _fake_sinkhorn(
    mixes: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, post_mult: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_sinkhorn(mixes, scale, base, iterations, eps, post_mult)
    return _empty_weights(mixes)


def _split_sinkhorn(
    mixes: Tensor, scale: Tensor, base: Tensor, iterations: int, eps: float, post_mult: float
) -> tuple[Tensor, Tensor, Tensor]:
    def make() -> Call:
        _check_sinkhorn(mixes, scale, base, iterations, eps, post_mult)
        gpu, problem = on_gpu(mixes), SmallProblem.make("hc_split_sinkhorn")
        record_if_asked(problem)
        tokens = mixes.numel() // MIX_WIDTH
        if not gpu:
            return lambda mixes, scale, base: reference.hc_split_sinkhorn(
                mixes, scale, base, iterations, eps, post_mult
            )
        if tokens == 0:
            return lambda mixes, scale, base: _empty_weights(mixes)
        where = Gpu(mixes, problem)
        spec = HC_SINKHORN.spec(where.arch)
        launch = where.launch(
            HC_SINKHORN,
            spec,
            (-(-tokens // HC_SINKHORN.num_threads(spec)),),
            tokens=tokens,
            iterations=iterations,
            eps=eps,
            post_mult=post_mult,
        )

        def call(mixes: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            pre, post, comb = _empty_weights(mixes)
            addresses = [tensor.data_ptr() for tensor in (mixes, scale, base, pre, post, comb)]
            check_aligned(("mixes",), addresses)
            launch(raw_stream(where.ordinal), *addresses)
            return pre, post, comb

        return where.here(call)

    tensors, numbers = (mixes, scale, base), (iterations, eps, post_mult)
    pre, post, comb = plan_of("hc_split_sinkhorn", tensors, numbers, make)(*tensors)
    return pre, post, comb


# -- The prenorm GEMM


def _check_prenorm(a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None, precision: str) -> None:
    check_tensor("a", a, tuple(_DTYPES), ("m", "k"))
    m, k = a.shape
    check_tensor("b", b, torch.float32, ("n", k), a)
    n = b.shape[0]
    if not 1 <= n <= MAX_N or k < 1:
        raise ProblemError(f"b has shape {list(b.shape)}; accepted is [n, k] with 1 <= n <= {MAX_N} and k >= 1")
    splits: tuple[int, ...] = ()
    if num_splits is not None:
        check_number("num_splits", num_splits, 1, MAX_GRID_Y)
        splits = (num_splits,)
    check_tensor("d", d, torch.float32, (*splits, m, n), a)
    check_tensor("sqr_sum", sqr_sum, torch.float32, (*splits, m), a)
    check_choice("precision", precision, PRECISIONS)
    check_rows("a", a)
    check_rows("b", b)
    if k % VECTOR:
        raise ProblemError(f"a has shape {[m, k]}; accepted is k a multiple of {VECTOR}")
    check_contiguous(d=d, sqr_sum=sqr_sum)


def _fake_prenorm(a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None, precision: str) -> None:
    _check_prenorm(a, b, d, sqr_sum, num_splits, precision)


def _prenorm_launch(
    gpu: Gpu, dtype: torch.dtype, a_row_stride: int, b: Tensor, m: int, splits: int, precision: str
) -> PlainLaunch:
    n, k = b.shape
    config = choose_prenorm(m)
    each, more = divmod(-(-k // SPLIT_BLOCK), splits)
    return gpu.launch(
        HC_PRENORM,
        HC_PRENORM.of(gpu.arch, n, config, precision == "fp32", dtype == torch.float32),
        (-(-m // config.tile_m), splits),
        a_row_stride=a_row_stride,
        b_row_stride=row_stride(b),
        m=m,
        n=n,
        k=k,
        blocks_per_split=each,
        longer_splits=more,
    )


def _prenorm(a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None, precision: str) -> None:
    def make() -> Call:
        _check_prenorm(a, b, d, sqr_sum, num_splits, precision)
        n, dtype = b.shape[0], _DTYPES[a.dtype]
        gpu, problem = on_gpu(a), SmallProblem.make("hc_prenorm_gemm", n=n, precision=precision, dtype=dtype)
        record_if_asked(problem)
        if not gpu:
            return lambda a, b, d, sqr_sum: _reference_prenorm(a, b, d, sqr_sum, num_splits)
        if a.shape[0] == 0:
            return lambda *_: None
        where = Gpu(a, problem)
        launch = _prenorm_launch(where, a.dtype, row_stride(a), b, a.shape[0], num_splits or 1, precision)

        spans = [span_of(tensor) for tensor in (a, b, d, sqr_sum)]

        def call(*tensors: Tensor) -> None:
            addresses = [tensor.data_ptr() for tensor in tensors]
            check_aligned(("a", "b"), addresses)
            known = list(zip(("a", "b", "d"), addresses, spans, strict=False))
            check_apart("d", addresses[2], spans[2], known[:2])
            check_apart("sqr_sum", addresses[3], spans[3], known)
            launch(raw_stream(where.ordinal), *addresses)

        return where.here(call)

    tensors = (a, b, d, sqr_sum)
    plan_of("hc_prenorm_gemm", tensors, (num_splits, precision), make)(*tensors)


def _reference_prenorm(a: Tensor, b: Tensor, d: Tensor, sqr_sum: Tensor, num_splits: int | None) -> None:
    for split, (start, end) in enumerate(reference.split_ranges(a.shape[1], num_splits or 1)):
        product, squares = reference.hc_prenorm_gemm(a[:, start:end], b[:, start:end])
        (d if num_splits is None else d[split]).copy_(product)
        (sqr_sum if num_splits is None else sqr_sum[split]).copy_(squares)


# -- hc_pre and hc_head


def _check_streams(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, mixes: int, scales: int) -> None:
    check_tensor("x", x, tuple(_DTYPES), ("tokens", STREAMS, "width"))
    width = x.shape[2]
    if width < 1 or width % VECTOR:
        raise ProblemError(f"x has shape {list(x.shape)}; accepted is a width that is a multiple of {VECTOR}")
    check_tensor("fn", fn, torch.float32, (mixes, STREAMS * width), x)
    check_tensor("scale", scale, torch.float32, (scales,), x)
    check_tensor("base", base, torch.float32, (mixes,), x)
    check_contiguous(x=x, scale=scale, base=base)
    check_rows("fn", fn)


def _check_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
    post_mult: float,
    precision: str,
) -> None:
    _check_streams(x, fn, scale, base, MIX_WIDTH, 3)
    check_number("norm_eps", norm_eps, 0, 1, float)
    check_choice("precision", precision, PRECISIONS)
    _check_numbers(iterations, eps, post_mult)


def _empty_pre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, width = x.shape
    post, comb = (x.new_empty((tokens, *shape), dtype=torch.float32) for shape in ((STREAMS,), (STREAMS, STREAMS)))
    return x.new_empty((tokens, width), dtype=torch.bfloat16), post, comb


def _fake_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
    post_mult: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_pre(x, fn, scale, base, norm_eps, eps, iterations, post_mult, precision)
    return _empty_pre(x)


def _pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: float,
    eps: float,
    iterations: int,
    post_mult: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    def make() -> Call:
        _check_pre(x, fn, scale, base, norm_eps, eps, iterations, post_mult, precision)
        gpu, problem = on_gpu(x), SmallProblem.make("hc_pre", precision=precision, dtype=_DTYPES[x.dtype])
        record_if_asked(problem)
        if not gpu:
            return lambda x, fn, scale, base: reference.hc_pre(x, fn, scale, base, norm_eps, eps, iterations, post_mult)
        if x.shape[0] == 0:
            return lambda x, *_: _empty_pre(x)
        return _mixing_plan(x, fn, problem, False, precision, norm_eps, eps, iterations, post_mult)

    numbers = (norm_eps, eps, iterations, post_mult, precision)
    tensors = (x, fn, scale, base)
    y, post, comb = plan_of("hc_pre", tensors, numbers, make)(*tensors)
    return y, post, comb


def _check_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, eps: float, precision: str
) -> None:
    _check_streams(x, fn, scale, base, STREAMS, 1)
    check_number("norm_eps", norm_eps, 0, 1, float)
    check_number("eps", eps, 0, 1, float)
    check_choice("precision", precision, PRECISIONS)


def _empty_head(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2]), dtype=torch.bfloat16)


def _fake_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, eps: float, precision: str
) -> Tensor:
    _check_head(x, fn, scale, base, norm_eps, eps, precision)
    return _empty_head(x)


def _head(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, eps: float, precision: str) -> Tensor:
    def make() -> Call:
        _check_head(x, fn, scale, base, norm_eps, eps, precision)
        gpu, problem = on_gpu(x), SmallProblem.make("hc_head", precision=precision, dtype=_DTYPES[x.dtype])
        record_if_asked(problem)
        if not gpu:
            return lambda x, fn, scale, base: (reference.hc_head(x, fn, scale, base, norm_eps, eps),)
        if x.shape[0] == 0:
            return lambda x, *_: (_empty_head(x),)
        return _mixing_plan(x, fn, problem, True, precision, norm_eps, eps, 1, 0.0)

    tensors = (x, fn, scale, base)
    y: Tensor = plan_of("hc_head", tensors, (norm_eps, eps, precision), make)(*tensors)[0]
    return y


def _mixing_plan(
    x: Tensor,
    fn: Tensor,
    problem: SmallProblem,
    head: bool,
    precision: str,
    norm_eps: float,
    eps: float,
    iterations: int,
    post_mult: float,
) -> Call:
    """The prenorm GEMM, then the kernel that sums its splits and mixes the streams."""
    tokens, _, width = x.shape
    mixes, k = fn.shape
    gpu = Gpu(x, problem)
    fp32 = x.dtype == torch.float32
    splits = choose_num_splits(tokens, k, gpu.num_sms)
    prenorm = _prenorm_launch(gpu, x.dtype, k, fn, tokens, splits, precision)
    per_block = choose_mix_tokens(tokens)
    mix = gpu.launch(
        HC_MIX,
        HC_MIX.of(gpu.arch, head, fp32, per_block),
        (tokens + (0 if head else -(-tokens // per_block)), -(-width // COLUMNS)),
        follows=True,
        tokens=tokens,
        vectors=width // VECTOR,
        splits=splits,
        iterations=iterations,
        mean_factor=1 / k,
        norm_eps=norm_eps,
        eps=eps,
        post_mult=post_mult,
    )
    products = splits * tokens * mixes  # floats, then the squares

    def call(x: Tensor, fn: Tensor, scale: Tensor, base: Tensor) -> tuple[Tensor, ...]:
        streams, matrix = x.data_ptr(), fn.data_ptr()
        check_aligned(("x", "fn"), (streams, matrix))
        stream = raw_stream(gpu.ordinal)
        outputs: tuple[Tensor, ...] = (_empty_head(x),) if head else _empty_pre(x)
        workspace = scale.new_empty(products + splits * tokens)
        parts = workspace.data_ptr()
        squares = parts + 4 * products
        prenorm(stream, streams, matrix, parts, squares)
        weights = (0, 0) if head else (outputs[1].data_ptr(), outputs[2].data_ptr())
        mix(stream, parts, squares, streams, scale.data_ptr(), base.data_ptr(), outputs[0].data_ptr(), *weights)
        return outputs

    return gpu.here(call)


# -- hc_post


def _check_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> None:
    check_tensor("x", x, torch.bfloat16, ("tokens", "width"))
    tokens, width = x.shape
    if width < 1 or width % VECTOR:
        raise ProblemError(f"x has shape {[tokens, width]}; accepted is a width that is a multiple of {VECTOR}")
    check_tensor("residual", residual, tuple(_DTYPES), (tokens, STREAMS, width), x)
    check_tensor("post", post, torch.float32, (tokens, STREAMS), x)
    check_tensor("comb", comb, torch.float32, (tokens, STREAMS, STREAMS), x)
    check_contiguous(x=x, residual=residual, post=post, comb=comb)


def _fake_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    _check_post(x, residual, post, comb)
    return torch.empty_like(residual)


def _post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    if not isinstance(residual, Tensor):
        _check_post(x, residual, post, comb)
    y = torch.empty_like(residual)
    _post_into(x, residual, post, comb, y)
    return y


def _post_inplace(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> None:
    _post_into(x, residual, post, comb, residual)


def _post_into(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor, y: Tensor) -> None:
    def make() -> Call:
        _check_post(x, residual, post, comb)
        gpu, problem = on_gpu(x), SmallProblem.make("hc_post", dtype=_DTYPES[residual.dtype])
        record_if_asked(problem)
        tokens, width = x.shape
        if not gpu:
            return lambda x, residual, post, comb, y: y.copy_(reference.hc_post(x, residual, post, comb))
        if tokens == 0:
            return lambda *_: None
        where = Gpu(x, problem)
        grid = tokens, -(-width // COLUMNS)
        launch = where.launch(
            HC_POST, HC_POST.spec(where.arch, fp32=residual.dtype == torch.float32), grid, vectors=width // VECTOR
        )
        spans = [span_of(tensor) for tensor in (x, residual, post, comb)]

        def call(*tensors: Tensor) -> None:
            addresses = [tensor.data_ptr() for tensor in tensors]
            check_aligned(("x", "residual", "post", "comb"), addresses)
            if addresses[4] == addresses[1]:  # in place
                inputs = (
                    ("x", addresses[0], spans[0]),
                    ("post", addresses[2], spans[2]),
                    ("comb", addresses[3], spans[3]),
                )
                check_apart("residual, which is written,", addresses[1], spans[1], inputs)
            launch(raw_stream(where.ordinal), *addresses)

        return where.here(call)

    tensors = (x, residual, post, comb)
    plan_of("hc_post", tensors, (), make)(*tensors, y)


define(
    "hc_split_sinkhorn(Tensor mixes, Tensor scale, Tensor base, int sinkhorn_iterations, float eps, float post_mult)"
    " -> (Tensor, Tensor, Tensor)",
    _split_sinkhorn,
    _fake_sinkhorn,
)
define(
    "tf32_hc_prenorm_gemm(Tensor a, Tensor b, Tensor(d!) d, Tensor(s!) sqr_sum, int? num_splits, str precision) -> ()",
    _prenorm,
    _fake_prenorm,
)
define(
    "hc_pre(Tensor x, Tensor fn, Tensor scale, Tensor base, float norm_eps, float eps, int sinkhorn_iterations,"
    " float post_mult, str precision) -> (Tensor, Tensor, Tensor)",
    _pre,
    _fake_pre,
)
define("hc_post(Tensor x, Tensor residual, Tensor post, Tensor comb) -> Tensor", _post, _fake_post)
define(
    "hc_post_(Tensor x, Tensor(r!) residual, Tensor post, Tensor comb) -> ()",
    _post_inplace,
    lambda x, residual, post, comb: _check_post(x, residual, post, comb),
)
define(
    "hc_head(Tensor x, Tensor fn, Tensor scale, Tensor base, float norm_eps, float eps, str precision) -> Tensor",
    _head,
    _fake_head,
)
